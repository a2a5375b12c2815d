// Reading and writing activations, float32 or bf16, as float32: one, sixteen, or as many as there are.
#pragma once
#include <cstring>

#include LINESHAFT_LANES
#include "kernels.h"

namespace {

inline float at(Activation kind, const void* x, int64_t i) {
    if (kind == Activation::f32) return static_cast<const float*>(x)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(x)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline const void* row_of(Activation kind, const void* x, int64_t offset) {
    return static_cast<const char*>(x) + offset * (kind == Activation::f32 ? 4 : 2);
}

inline Lanes::F read16(Activation kind, const void* x, int64_t i) {
    return kind == Activation::f32 ? Lanes::load(static_cast<const float*>(x) + i) : Lanes::from_bf16(static_cast<const uint16_t*>(x) + i);
}

inline void write16(Activation kind, void* x, int64_t i, Lanes::F value) {
    if (kind == Activation::f32) Lanes::store(static_cast<float*>(x) + i, value);
    else Lanes::to_bf16(static_cast<uint16_t*>(x) + i, value);
}

/// As what the activations are kept in: float32 as it is, bf16 rounded and widened again.
inline Lanes::F rounded(Activation kind, Lanes::F value) {
    if (kind == Activation::f32) return value;
    alignas(64) uint16_t narrow[16];
    Lanes::to_bf16(narrow, value);
    return Lanes::from_bf16(narrow);
}

/// Up to 16 numbers from `i` on; zeros behind them.
inline Lanes::F read_some(Activation kind, const void* x, int64_t i, int64_t count) {
    if (count >= 16) return read16(kind, x, i);
    alignas(64) float part[16] = {};
    for (int64_t j = 0; j < count; j++) part[j] = at(kind, x, i + j);
    return Lanes::load(part);
}

inline void write_some(Activation kind, void* x, int64_t i, int64_t count, Lanes::F value) {
    if (count >= 16) return write16(kind, x, i, value);
    alignas(64) float part[16];
    alignas(64) uint16_t narrow[16];
    Lanes::store(part, value);
    Lanes::to_bf16(narrow, value);
    if (kind == Activation::f32) std::memcpy(static_cast<float*>(x) + i, part, size_t(count) * 4);
    else std::memcpy(static_cast<uint16_t*>(x) + i, narrow, size_t(count) * 2);
}

}  // namespace
