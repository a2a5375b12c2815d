// The product of some tokens and one group of outputs on vector registers: as many tokens at a time as accumulators fit.
#pragma once
#include "activations.h"
#include "micro.h"
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

namespace on_vectors {

inline Layout layout_of(const Linear& l, void* scratch) {
    const int64_t most = Lanes::kMaxRows, count = (l.tokens + most - 1) / most;
    return layout_for(l, scratch, (l.tokens + count - 1) / count);
}

inline void pack_tile(const Linear& l, const Layout& s, int64_t tile) {
    const int64_t first = tile * s.tile, count = std::min(s.tile, l.tokens - first);
    for (int64_t m = 0; m < count; m++) {
        const void* x = token_of(l, first + m);
        uint32_t* to = s.packed + first * s.words + m;
        if (l.whole) round_token(l, x, s, count, to, s.scale + first + m, count, s.whole + first * s.scales + m);
        else pack_token(l, x, s, count, to, s.real + first * s.scales + m);
    }
}

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

}  // namespace on_vectors
}  // namespace
