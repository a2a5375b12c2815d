// The product of tokens and packed weights: activations packed into tiles once, then each thread takes its groups of outputs.
#pragma once
#include <algorithm>
#include <cstring>

#include LINESHAFT_PRODUCTS

namespace {

/// A tile's numbers of one group of outputs, with the bias, rounded once, to where they belong.
inline void put(const Linear& l, int64_t first, int64_t count, int64_t group, const float* numbers) {
    const auto kind = l.wide ? Activation::f32 : l.activation;
    const int64_t start = group * kGroup, width = std::min<int64_t>(kGroup, l.shape.outputs - start);
    for (int64_t m = 0; m < count; m++) {
        const float* from = numbers + m * kGroup;
        const int64_t place = (first + m) * l.out_stride + start;
        int64_t o = 0;
        for (; o + kBlock <= width; o += kBlock) {
            auto value = Lanes::load(from + o);
            if (l.bias) value = Lanes::add(value, Lanes::load(l.bias + start + o));
            if (kind == Activation::f32) Lanes::store(static_cast<float*>(l.out) + place + o, value);
            else Lanes::to_bf16(static_cast<uint16_t*>(l.out) + place + o, value);
        }
        if (o == width) continue;
        alignas(64) float rest[kBlock] = {};
        alignas(64) uint16_t narrow[kBlock];
        for (int64_t j = 0; j < width - o; j++) rest[j] = from[o + j] + (l.bias ? l.bias[start + o + j] : 0.0f);
        Lanes::to_bf16(narrow, Lanes::load(rest));
        if (kind == Activation::f32) std::memcpy(static_cast<float*>(l.out) + place + o, rest, size_t(width - o) * 4);
        else std::memcpy(static_cast<uint16_t*>(l.out) + place + o, narrow, size_t(width - o) * 2);
    }
}

inline void groups_of(const Linear& l, const Layout& s, team::Range groups) {
    alignas(64) static thread_local float numbers[kTogether * kMostTokens * kGroup];
    Tiling tiling;
    const int64_t most = together(l, s);
    for (int64_t group = groups.first; group < groups.last; group += most) {
        const int64_t count = std::min(most, groups.last - group);
        for (int64_t tile = 0; tile < s.tiles(l.tokens); tile++) {
            multiply(l, s, tile, group, count, numbers, tiling);
            for (int64_t i = 0; i < count; i++)
                put(l, tile * s.tile, std::min(s.tile, l.tokens - tile * s.tile), group + i, numbers + i * kMostTokens * kGroup);
        }
    }
}

inline void linear(const Linear& l, void* scratch, int part, int parts) {
    groups_of(l, layout_of(l, scratch), team::share(l.shape.groups(), part, parts));
}

}  // namespace
