// Entries of cache pages in 8 bits: what a token leaves behind as codes with scales.
//
// An entry of `width` channels is a signed code for each, a byte of 0 where their number is odd, and a bf16 scale for each 64 of
// them (the last group may be shorter); a channel is code * scale. 64 channels take 66 bytes. Its reference is ops/coded_pages.py.
#pragma once
#include <algorithm>
#include <cstring>

#include "activations.h"
#include "kernels.h"
#include "team.h"

namespace {

constexpr int kScaled = 64;  // channels that share a scale

inline int64_t scales_at(int64_t width) { return width + width % 2; }
inline int64_t entry_bytes(int64_t width) { return scales_at(width) + 2 * ((width + kScaled - 1) / kScaled); }

/// The scale of some channels: their largest one's 127th part, as the next bf16 that is not smaller. A NaN where one is none or infinite.
inline uint16_t scale_of(Activation kind, const void* x, int64_t first, int64_t count) {
    constexpr uint16_t kNaN = 0x7fc0;
    const auto zero = Lanes::set1(0.0f);
    auto most = zero, spoilt = zero;
    for (int64_t i = 0; i < count; i += 16) {
        const auto value = read_some(kind, x, first + i, count - i);
        most = Lanes::max(most, Lanes::max(value, Lanes::sub(zero, value)));
        spoilt = Lanes::fma(value, zero, spoilt);  // max would lose a NaN
    }
    if (Lanes::sum(spoilt) != 0) return kNaN;
    const float exact = Lanes::largest(most) / 127;
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    return uint16_t((bits + 0xffff) >> 16);
}

inline void encode(Activation kind, const void* x, int64_t width, uint8_t* entry) {
    uint8_t* scales = entry + scales_at(width);
    if (width % 2) entry[width] = 0;
    for (int64_t first = 0; first < width; first += kScaled, scales += 2) {
        const int64_t count = std::min<int64_t>(kScaled, width - first);
        const uint16_t bits = scale_of(kind, x, first, count);
        std::memcpy(scales, &bits, 2);
        const float scale = at(Activation::bf16, &bits, 0);
        if (!(scale > 0)) {
            std::memset(entry + first, 0, size_t(count));
            continue;
        }
        for (int64_t i = 0; i < count; i += 16) {
            alignas(16) uint8_t codes[16];
            Lanes::to_bytes(codes, Lanes::round(Lanes::div(read_some(kind, x, first + i, count - i), Lanes::set1(scale))));
            std::memcpy(entry + first + i, codes, size_t(std::min<int64_t>(16, count - i)));
        }
    }
}

/// An entry as `kind`. Whole vectors are written: what stands behind the last channel means nothing.
inline void decode(Activation kind, const uint8_t* entry, int64_t width, void* out) {
    const uint8_t* scales = entry + scales_at(width);
    for (int64_t i = 0; i < width; i += 16) {
        const auto scale = Lanes::set1(at(Activation::bf16, scales + i / kScaled * 2, 0));
        alignas(16) uint8_t rest[16] = {};
        const uint8_t* codes = entry + i;
        if (width - i < 16) codes = static_cast<uint8_t*>(std::memcpy(rest, codes, size_t(width - i)));
        write16(kind, out, i, Lanes::mul(Lanes::signed_bytes(codes), scale));
    }
}

/// Puts each token's entries into its slot.
inline void write_codes(const Entries& e, int part, int parts) {
    const auto own = team::share(e.tokens, part, parts);
    const int64_t size = entry_bytes(e.width);
    for (int64_t t = own.first; t < own.last; t++)
        for (int64_t h = 0; h < e.heads; h++)
            encode(e.activation, row_of(e.activation, e.x, t * e.x_stride + h * e.head_stride), e.width, e.pages + (e.slots[t] * e.heads + h) * size);
}

}  // namespace
