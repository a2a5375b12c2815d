// The product of tokens and packed weights: activations packed into tiles once, then each thread takes its groups of outputs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "micro.h"
#include "numbers.h"
#include "team.h"

namespace {

constexpr int blocks_for(int tokens) { return Lanes::kBlocks == 4 ? 4 : Lanes::kMaxRows < 4 ? 1 : tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

using Tile = void (*)(const Shape&, const uint32_t*, const uint8_t*, int, const Sums&, float*);

template <class Dot, bool Coded, int M>
void whole_group(const Shape& shape, const uint32_t* a, const uint8_t* group, int, const Sums& sums, float* out) {
    constexpr int B = blocks_for(M);
    for (int first = 0; first < kGroup / kBlock; first += B) {
        if constexpr (Coded) coded_tile<Dot, M, B>(shape, a, group, first, sums, out);
        else dense_tile<Dot, M, B>(shape, a, group, first, sums, out);
    }
}

template <class Dot, bool Coded>
Tile tile_for(int tokens) {
    switch (tokens) {
        case 1: return whole_group<Dot, Coded, 1>;
        case 2: return whole_group<Dot, Coded, 2>;
        default: break;
    }
    if constexpr (Lanes::kMaxRows >= 4) {
        if (tokens == 3) return whole_group<Dot, Coded, 3>;
        if (tokens == 4) return whole_group<Dot, Coded, 4>;
    }
    if constexpr (Lanes::kMaxRows >= 6) {
        if (tokens == 5) return whole_group<Dot, Coded, 5>;
        return whole_group<Dot, Coded, 6>;
    }
    return whole_group<Dot, Coded, 2>;
}

inline Tile tile_of(const Linear& l, int tokens) {
    switch (l.shape.kind) {
        case Weight::f32: return tile_for<DotF32, false>(tokens);
        case Weight::bf16: return tile_for<DotBf16, false>(tokens);
        case Weight::int8: return l.whole ? tile_for<DotI8, true>(tokens) : tile_for<DotW8, true>(tokens);
        default: return l.whole ? tile_for<DotI4, true>(tokens) : tile_for<DotW4, true>(tokens);
    }
}

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

inline Layout layout_of(const Linear& l, void* scratch) {
    Layout s;
    const int64_t most = Lanes::kMaxRows, count = (l.tokens + most - 1) / most;
    s.tile = (l.tokens + count - 1) / count;
    s.words = l.shape.words(l.whole);
    s.scales = l.shape.scales();
    s.packed = static_cast<uint32_t*>(scratch);
    s.scale = reinterpret_cast<float*>(s.packed + l.tokens * s.words);
    s.whole = reinterpret_cast<int32_t*>(s.scale + l.tokens);
    s.real = reinterpret_cast<float*>(s.whole);
    return s;
}

/// One token in 8 bits: q = round(x / scale), scale = max|x| / 127. Words go to every `step`-th place from `to` on.
inline void round_token(const Linear& l, const void* x, const Layout& s, int64_t step, uint32_t* to, float* scale, int32_t* sums) {
    const int64_t inputs = l.shape.inputs, group = l.shape.scale_inputs;
    auto limit = Lanes::set1(0.0f), nothing = limit;
    for (int64_t i = 0; i < inputs; i += 16) {
        const auto value = read_some(l.activation, x, i, inputs - i);
        limit = Lanes::max(limit, Lanes::max(value, Lanes::sub(Lanes::set1(0.0f), value)));
        nothing = Lanes::fma(value, Lanes::set1(0.0f), nothing);  // max loses a NaN; this is one after any, and after infinity
    }
    const float step_size = Lanes::largest(limit) / 127.0f, spoilt = Lanes::sum(nothing);
    *scale = spoilt != spoilt ? spoilt : step_size > 0 ? step_size : 1.0f;
    const auto width = Lanes::set1(*scale), most = Lanes::set1(127.0f), least = Lanes::set1(-127.0f);
    for (int64_t g = 0; g < s.scales; g++) {
        auto sum = Lanes::set1(0.0f);  // of whole numbers: exact as long as a group has fewer than 2^24 / 127 inputs
        for (int64_t i = g * group; i < (g + 1) * group; i += 16) {
            const int64_t count = std::min<int64_t>(16, (g + 1) * group - i);
            const auto q = Lanes::min(Lanes::max(Lanes::round(Lanes::div(read_some(l.activation, x, i, count), width)), least), most);
            sum = Lanes::add(sum, q);
            uint32_t words[4];
            Lanes::to_bytes(words, q);
            for (int64_t j = 0; j < count / 4; j++) to[(i / 4 + j) * step] = words[j];
        }
        sums[g * step] = int32_t(Lanes::sum(sum));
    }
}

inline void pack_token(const Linear& l, const void* x, const Layout& s, int64_t step, uint32_t* to, float* sums) {
    if (l.shape.kind == Weight::bf16) {
        const auto* pairs = static_cast<const uint16_t*>(x);
        for (int64_t i = 0; i < s.words; i++) std::memcpy(&to[i * step], pairs + 2 * i, 4);
        return;
    }
    for (int64_t i = 0; i < s.words; i++) {
        const float value = at(l.activation, x, i);
        std::memcpy(&to[i * step], &value, 4);
    }
    if (!l.shape.zeros) return;
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

inline void pack_tile(const Linear& l, const Layout& s, int64_t tile) {
    const int64_t first = tile * s.tile, count = std::min(s.tile, l.tokens - first);
    for (int64_t m = 0; m < count; m++) {
        const void* x = token_of(l, first + m);
        uint32_t* to = s.packed + first * s.words + m;
        if (l.whole) round_token(l, x, s, count, to, s.scale + first + m, s.whole + first * s.scales + m);
        else pack_token(l, x, s, count, to, s.real + first * s.scales + m);
    }
}

/// A tile's numbers of one group of outputs, with the bias, rounded once, to where they belong.
inline void put(const Linear& l, int64_t first, int64_t count, int64_t group, const float* numbers) {
    const int64_t start = group * kGroup, width = std::min<int64_t>(kGroup, l.shape.outputs - start);
    for (int64_t m = 0; m < count; m++) {
        const float* from = numbers + m * kGroup;
        const int64_t place = (first + m) * l.out_stride + start;
        int64_t o = 0;
        for (; o + kBlock <= width; o += kBlock) {
            auto value = Lanes::load(from + o);
            if (l.bias) value = Lanes::add(value, Lanes::load(l.bias + start + o));
            if (l.activation == Activation::f32) Lanes::store(static_cast<float*>(l.out) + place + o, value);
            else Lanes::to_bf16(static_cast<uint16_t*>(l.out) + place + o, value);
        }
        if (o == width) continue;
        alignas(64) float rest[kBlock] = {};
        alignas(64) uint16_t narrow[kBlock];
        for (int64_t j = 0; j < width - o; j++) rest[j] = from[o + j] + (l.bias ? l.bias[start + o + j] : 0.0f);
        Lanes::to_bf16(narrow, Lanes::load(rest));
        if (l.activation == Activation::f32) std::memcpy(static_cast<float*>(l.out) + place + o, rest, size_t(width - o) * 4);
        else std::memcpy(static_cast<uint16_t*>(l.out) + place + o, narrow, size_t(width - o) * 2);
    }
}

/// Is there nothing to pack? One token's dense row is packed already.
inline bool as_it_is(const Linear& l) { return l.tokens == 1 && !l.shape.scale_inputs; }

inline void pack(const Linear& l, void* scratch, int part, int parts) {
    if (as_it_is(l)) return;
    const Layout s = layout_of(l, scratch);
    const auto own = team::share(s.tiles(l.tokens), part, parts);
    for (int64_t tile = own.first; tile < own.last; tile++) pack_tile(l, s, tile);
}

/// One tile of tokens times one group of outputs: [tokens of the tile][64].
inline void multiply(const Linear& l, const Layout& s, int64_t tile, int64_t group, float* numbers) {
    const int64_t first = tile * s.tile, count = std::min(s.tile, l.tokens - first);
    const Sums sums{l.whole ? s.scale + first : nullptr, s.whole + first * s.scales, s.real + first * s.scales};
    const auto* packed = as_it_is(l) ? static_cast<const uint32_t*>(token_of(l, 0)) : s.packed + first * s.words;
    tile_of(l, int(count))(l.shape, packed, l.weight + group * l.shape.group_bytes(), 0, sums, numbers);
}

inline void groups_of(const Linear& l, const Layout& s, team::Range groups) {
    alignas(64) float numbers[Lanes::kMaxRows * kGroup];
    for (int64_t group = groups.first; group < groups.last; group++)
        for (int64_t tile = 0; tile < s.tiles(l.tokens); tile++) {
            multiply(l, s, tile, group, numbers);
            put(l, tile * s.tile, std::min(s.tile, l.tokens - tile * s.tile), group, numbers);
        }
}

inline void linear(const Linear& l, void* scratch, int part, int parts) {
    groups_of(l, layout_of(l, scratch), team::share(l.shape.groups(), part, parts));
}

}  // namespace
