// Activations on their way into a product: rounded to 8 bits where the product wants them so, and put where its loops look for them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "numbers.h"

namespace {

/// Where things lie in the packed activations of one call.
struct Layout {
    int64_t tile;             // tokens in a tile, but for the last
    int64_t words;            // 32-bit words of a token
    int64_t scales;           // sums of a token
    uint32_t* packed;         // [tokens * words]
    float* scale;             // [tokens]
    int32_t* whole;           // [tokens * scales]
    float* real;

    int64_t tiles(int64_t tokens) const { return (tokens + tile - 1) / tile; }
};

/// Are codes, FP8 among them, multiplied as pairs of bf16? They and activations in bf16 are exact in it.
inline bool in_pairs(const Linear& l) { return Lanes::kDotBf16 && l.activation == Activation::bf16 && l.shape.scale_inputs && !l.whole; }

/// Is there nothing to pack? One token's dense row is packed already.
inline bool as_it_is(const Linear& l) { return l.tokens == 1 && !l.shape.scale_inputs; }

/// Are activations in bf16 made float32 before they meet weights in bf16? Where they are packed and there are no products of pairs.
inline bool in_singles(const Linear& l) { return !Lanes::kDotBf16 && l.shape.kind == Weight::bf16 && !as_it_is(l); }

/// Do activations in 8 bits have 16 in the product?
inline bool halves(const Linear& l) { return Lanes::kHalves && l.shape.kind == Weight::int8; }

/// 32-bit words of a token's packed activations.
inline int64_t words_of(const Linear& l) {
    if (in_pairs(l)) return l.shape.inputs / 2;
    if (l.whole) return l.shape.inputs / (halves(l) ? 2 : 4);
    return l.shape.scale_inputs || in_singles(l) ? l.shape.inputs : l.shape.inputs / inputs_a_row(l.shape.kind);
}

/// The same for tiles of so many tokens.
inline Layout layout_for(const Linear& l, void* scratch, int64_t tile) {
    Layout s;
    s.tile = tile;
    s.words = words_of(l);
    s.scales = l.shape.scales();
    s.packed = static_cast<uint32_t*>(scratch);
    s.scale = reinterpret_cast<float*>(s.packed + l.tokens * s.words);
    s.whole = reinterpret_cast<int32_t*>(s.scale + l.tokens);
    s.real = reinterpret_cast<float*>(s.whole);
    return s;
}

/// The scale of a token in 8 bits: max|x| / 127, or that of all tokens; no number where the token holds one that is none or infinite.
inline float scale_of(const Linear& l, const void* x) {
    auto limit = Lanes::set1(0.0f), nothing = limit;
    for (int64_t i = 0; i < l.shape.inputs; i += 16) {
        const auto value = read_some(l.activation, x, i, l.shape.inputs - i);
        limit = Lanes::max(limit, Lanes::max(value, Lanes::sub(Lanes::set1(0.0f), value)));
        nothing = Lanes::fma(value, Lanes::set1(0.0f), nothing);  // max loses a NaN; this is one after any, and after infinity
    }
    const float found = Lanes::largest(limit) / 127.0f, spoilt = Lanes::sum(nothing);
    return spoilt != spoilt ? spoilt : l.input_scale > 0 ? l.input_scale : found > 0 ? found : 1.0f;
}

/// Four numbers of 8 bits to the `step`-th places of word `i`; `halves`: as two words of 16 bits each, first of the even ones.
inline void put_word(uint32_t bytes, bool halves, uint32_t* to, int64_t i, int64_t step) {
    if (!halves) {
        to[i * step] = bytes;
        return;
    }
    const auto wide = [&](int byte) { return uint32_t(uint16_t(int16_t(int8_t(bytes >> (8 * byte))))); };
    to[2 * i * step] = wide(0) | wide(2) << 16;
    to[(2 * i + 1) * step] = wide(1) | wide(3) << 16;
}

/// One token in 8 bits: q = round(x / scale), to -127 where the scale is the token's own, else to -128. Words go to every `step`-th place
/// from `to` on, sums to every `sum_step`-th.
inline void round_token(const Linear& l, const void* x, const Layout& s, int64_t step, uint32_t* to, float* scale, int64_t sum_step, int32_t* sums) {
    const int64_t group = l.shape.scale_inputs;
    *scale = scale_of(l, x);
    const auto width = Lanes::set1(*scale), most = Lanes::set1(127.0f), least = Lanes::set1(l.input_scale > 0 ? -128.0f : -127.0f);
    for (int64_t g = 0; g < s.scales; g++) {
        auto sum = Lanes::set1(0.0f);  // of whole numbers: exact as long as a group has at most 2^24 / 128 inputs
        for (int64_t i = g * group; i < (g + 1) * group; i += 16) {
            const int64_t count = std::min<int64_t>(16, (g + 1) * group - i);
            const auto q = Lanes::min(Lanes::max(Lanes::round(Lanes::div(read_some(l.activation, x, i, count), width)), least), most);
            sum = Lanes::add(sum, q);
            uint32_t words[4];
            Lanes::to_bytes(words, q);
            for (int64_t j = 0; j < count / 4; j++) put_word(words[j], halves(l), to, i / 4 + j, step);
        }
        sums[g * sum_step] = int32_t(Lanes::sum(sum));
    }
}

inline void pack_words(const Linear& l, const void* x, const Layout& s, int64_t step, uint32_t* to) {
    const auto* narrow = static_cast<const uint16_t*>(x);
    if (in_pairs(l) && l.shape.kind == Weight::int4) {
        for (int64_t i = 0; i < s.words; i++) {  // of eight inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7: see DotW4Pairs
            const int64_t first = i / 2 * 4 + i % 2;
            to[i * step] = uint32_t(narrow[first]) | uint32_t(narrow[first + 2]) << 16;
        }
    } else if (in_pairs(l) || (l.shape.kind == Weight::bf16 && !in_singles(l))) {
        for (int64_t i = 0; i < s.words; i++) std::memcpy(&to[i * step], narrow + 2 * i, 4);
    } else {
        for (int64_t i = 0; i < s.words; i++) {
            const float value = at(l.activation, x, i);
            std::memcpy(&to[i * step], &value, 4);
        }
    }
}

/// Sums of one token over the inputs that share a zero point, to every `step`-th place.
inline void sum_token(const Linear& l, const void* x, const Layout& s, int64_t step, float* sums) {
    if (!l.shape.scale_inputs || !l.shape.zeros) return;
    const int64_t group = l.shape.scale_inputs;
    for (int64_t g = 0; g < s.scales; g++) {
        float sum = 0;
        for (int64_t i = g * group; i < (g + 1) * group; i++) sum += at(l.activation, x, i);
        sums[g * step] = sum;
    }
}

/// One token's activations.
inline const void* token_of(const Linear& l, int64_t token) {
    return row_of(l.activation, l.x, (l.rows ? l.rows[token] : token) * l.x_stride);
}

}  // namespace
