// The product of some tokens and one group of outputs on vector registers.
//
// As many tokens at a time as accumulators fit are a tile. Codes that several tiles of bf16 meet are made pairs of bf16 once for all
// of them, in pieces that stay in the first cache: a piece's sums go to memory and back exactly, so a token's numbers
// are the same bits as if its tile were alone.
#pragma once
#include "activations.h"
#include "micro.h"
#include "team.h"

namespace {
namespace on_vectors {

using Take = void (*)(const Piece&, const Tokens&);

template <class Dot, bool Coded>
Take take_for(int tokens) {
    switch (tokens) {
        case 1: return take<Dot, Coded, 1>;
        case 2: return take<Dot, Coded, 2>;
        default: break;
    }
    if constexpr (Lanes::kMaxRows >= 4) {
        if (tokens == 3) return take<Dot, Coded, 3>;
        if (tokens == 4) return take<Dot, Coded, 4>;
    }
    if constexpr (Lanes::kMaxRows >= 6) return tokens == 5 ? take<Dot, Coded, 5> : take<Dot, Coded, 6>;
    return take<Dot, Coded, 2>;
}

constexpr int64_t kTiles = 16;  // that share what was unpacked
constexpr int64_t kMostTokens = kTiles * Lanes::kMaxRows;
constexpr int64_t kUnpacked = 64;  // rows of a piece: 16 KB

/// Tokens of a tile: all tiles alike, but for the last.
inline int64_t tile_tokens(int64_t tokens) {
    const int64_t count = (tokens + Lanes::kMaxRows - 1) / Lanes::kMaxRows;
    return (tokens + count - 1) / count;
}

inline Layout layout_of(const Linear& l, void* scratch) { return layout_for(l, scratch, kTiles * tile_tokens(l.tokens)); }

inline void pack_tile(const Linear& l, const Layout& s, int64_t first, int64_t count) {
    for (int64_t m = 0; m < count; m++) {
        const void* x = token_of(l, first + m);
        uint32_t* to = s.packed + first * s.words + m;
        if (l.whole) {
            round_token(l, x, s, count, to, s.scale + first + m, count, s.whole + first * s.scales + m);
        } else {
            pack_words(l, x, s, count, to);
            sum_token(l, x, s, count, s.real + first * s.scales + m);
        }
    }
}

inline void pack(const Linear& l, void* scratch, int part, int parts) {
    if (as_it_is(l)) return;
    const Layout s = layout_of(l, scratch);
    const int64_t wide = tile_tokens(l.tokens);
    const auto own = team::share((l.tokens + wide - 1) / wide, part, parts);
    for (int64_t tile = own.first; tile < own.last; tile++) pack_tile(l, s, tile * wide, std::min(wide, l.tokens - tile * wide));
}

/// How the weights of a product are taken: their rows as they are, or for several tiles made rows of bf16 pairs first.
struct Way {
    Take (*take_for)(int tokens);
    void (*unpack)(const uint8_t* rows, int64_t count, uint8_t* to);  // null: as they are
    int words;  // of activations to a row
};

#ifdef LINESHAFT_DOT_BF16
/// Ahead: bytes ahead that are asked for.
template <class Dot, int Ahead = 0>
void unpack_pairs(const uint8_t* rows, int64_t count, uint8_t* to) {
    for (int64_t row = 0; row < count; row++, rows += kRowBytes, to += Dot::kWords * kRowBytes)
        for (int b = 0; b < kRowBytes; b += 64) {
            if constexpr (Ahead) __builtin_prefetch(rows + Ahead + b, 0, 3);
            const auto made = Dot::weights(rows + b);
            for (int j = 0; j < Dot::kWords; j++) Lanes::store_int(to + j * kRowBytes + b, made.pairs[j]);
        }
}

template <class Dot>
Way pairs_way(bool several) {
    return several ? Way{take_for<DotBf16, true>, unpack_pairs<Dot>, Dot::kWords} : Way{take_for<Dot, true>, nullptr, Dot::kWords};
}
#endif

using DotBytes = std::conditional_t<Lanes::kHalves, DotI8Apart, DotI8>;

inline Way way_of(const Linear& l, bool several) {
#ifdef LINESHAFT_DOT_BF16
    if (in_pairs(l)) {
        switch (l.shape.kind) {
            case Weight::int8: return pairs_way<DotW8Pairs>(several);
            case Weight::fp8: return pairs_way<DotF8Pairs>(several);
            default: return pairs_way<DotW4Pairs>(several);
        }
    }
#else
    (void)several;
#endif
    switch (l.shape.kind) {
        case Weight::f32: return {take_for<DotF32, false>, nullptr, DotF32::kWords};
        case Weight::bf16: return in_singles(l) ? Way{take_for<DotBf16Apart, false>, nullptr, DotBf16Apart::kWords} : Way{take_for<DotBf16, false>, nullptr, DotBf16::kWords};
        case Weight::fp8: return {take_for<DotF8, true>, nullptr, DotF8::kWords};
        case Weight::int8: return l.whole ? Way{take_for<DotBytes, true>, nullptr, DotBytes::kWords} : Way{take_for<DotW8, true>, nullptr, DotW8::kWords};
        default: return l.whole ? Way{take_for<DotI4, true>, nullptr, DotI4::kWords} : Way{take_for<DotW4, true>, nullptr, DotW4::kWords};
    }
}

/// The tokens of one tile of the layout: tiles of registers.
struct Unit {
    const Linear& l;
    const Layout& s;
    int64_t first, count, wide;
    const uint32_t* packed;

    int64_t tiles() const { return (count + wide - 1) / wide; }
    int64_t here(int64_t tile) const { return std::min(wide, count - tile * wide); }
    Tokens tokens(int64_t tile, float* parts, float* numbers) const {
        const int64_t from = tile * wide, at = first + from;
        const Sums sums{l.whole ? s.scale + at : nullptr, s.whole + at * s.scales, s.real + at * s.scales};
        return {packed + from * s.words, sums, parts ? parts + from * kGroup : nullptr, numbers + from * kGroup};
    }
};

/// Rows as they are: each tile takes all of them.
inline void take_rows(const Way& way, const Unit& u, const uint8_t* group, float* numbers) {
    const Shape& shape = u.l.shape;
    const int64_t rows = shape.rows_a_scale();
    for (int64_t tile = 0; tile < u.tiles(); tile++) {
        const Take take = way.take_for(int(u.here(tile)));
        Tokens tokens = u.tokens(tile, nullptr, numbers);
        const uint8_t* header = group;
        for (int64_t scale = 0; scale < shape.scales(); scale++) {
            const uint8_t* const from = header + shape.header_bytes();
            take({shape, from, rows, header, scale, true, true, {from + kAhead, kRowBytes}}, tokens);
            tokens.packed += rows * way.words * u.here(tile);
            header = from + rows * kRowBytes;
        }
    }
}

/// Pieces of rows, unpacked once for all tiles. The memory of the next piece is asked for meanwhile.
inline void take_unpacked(const Way& way, const Unit& u, const uint8_t* group, float* numbers) {
    alignas(64) float parts[kMostTokens * kGroup];
    alignas(64) uint8_t unpacked[kUnpacked * kRowBytes];
    const Shape& shape = u.l.shape;
    const int64_t rows = shape.rows_a_scale(), most = kUnpacked / way.words;
    const uint8_t* header = group;
    for (int64_t scale = 0; scale < shape.scales(); scale++) {
        const uint8_t* const first = header + shape.header_bytes();
        for (int64_t row = 0; row < rows; row += most) {
            const int64_t count = std::min(most, rows - row);
            const uint8_t* const from = first + row * kRowBytes;
            way.unpack(from, count, unpacked);
            const Piece piece{shape, unpacked, count * way.words, header, scale, row == 0, row + count == rows,
                              {from + count * kRowBytes, kRowBytes / way.words}};
            for (int64_t tile = 0; tile < u.tiles(); tile++) {
                Tokens tokens = u.tokens(tile, parts, numbers);
                tokens.packed += (scale * rows + row) * way.words * u.here(tile);
                way.take_for(int(u.here(tile)))(piece, tokens);
            }
        }
        header = first + rows * kRowBytes;
    }
}

/// One tile of the layout times one group of outputs: [tokens][64].
inline void multiply(const Linear& l, const Layout& s, int64_t tile, int64_t group, float* numbers) {
    const int64_t first = tile * s.tile;
    const auto* packed = as_it_is(l) ? static_cast<const uint32_t*>(token_of(l, 0)) : s.packed + first * s.words;
    const Unit u{l, s, first, std::min(s.tile, l.tokens - first), tile_tokens(l.tokens), packed};
    const Way way = way_of(l, u.tiles() > 1);
    (way.unpack ? take_unpacked : take_rows)(way, u, l.weight + group * l.shape.group_bytes(), numbers);
}

}  // namespace on_vectors
}  // namespace
