// Products on the tiles of AMX: bf16, and codes of 8 or 4 bits with 8-bit activations. All others are those of vectors.h.
//
// Sixteen rows of packed weights (packed.h), 256 bytes apart, are the tile of a block of outputs. Activations are packed into tiles
// too: 16 tokens at a time (the last ones fewer), for each tile of weights their words, token by token. A token's sums
// depend on nothing but its own row of a tile and the order of the tiles, so its numbers are the same bits in any company. Sums of
// 8-bit products are exact, and scaled as in micro.h: those of few tokens may so be made on vectors.
#pragma once
#include <algorithm>
#include <cstring>

#include LINESHAFT_TILES
#include "few.h"

namespace {

constexpr int kTileTokens = 16;
constexpr int kTileRows = 16;
constexpr int64_t kMostTokens = 256;  // in a tile of the layout: activations of so many tokens stay in the second cache
constexpr int64_t kChunk = 7;         // tiles of inputs that a group's weights stay in the first cache for: 28 KB
constexpr int64_t kTogether = 4;      // groups of outputs that share a chunk of the tokens
constexpr int64_t kStays = 768 << 10;  // bytes of tokens that stay in the second cache (2 MB) beside weights and sums
constexpr int64_t kFew = Lanes::kMaxRows;
constexpr int kSums = 0, kTokens = 4, kWeights = 6;  // tile registers: four of sums, two of activations, two of weights

/// Is it worked on in tiles? Codes that meet 8-bit activations, if they have more than one scale or 4 bits, only for more than a few tokens: for
/// these, spilling sums after each scale or widening codes costs more than tiles save (32 against 33 and 27 against 31 GB/s, notes of a
/// Sapphire Rapids).
inline bool tiled(const Linear& l) {
    if (l.shape.kind == Weight::bf16) return l.tokens > kFewTokens;
    if (in_pairs(l)) return l.shape.kind == Weight::int4 || l.tokens > kFewOfCodes;  // 24 beside 20, 21 beside 23 GB/s
    return l.whole && (l.tokens > kFew || (l.tokens > 1 && l.shape.kind == Weight::int8 && l.shape.scales() == 1));
}

/// Rows of tiles that a row of packed weights becomes: codes meet bytes or pairs of bf16.
inline int widened(const Linear& l) { return int(words_of(l) / (l.shape.rows_a_scale() * l.shape.scales())); }

/// Rows of a tile of weights, each 4 bytes of every output: as many as divide what shares a scale, so that no tile is cut. All 16
/// where the inputs are a multiple of 32 (bf16) or 64; a width without such a divisor works, slower.
inline int tile_rows(const Shape& shape, int widened) {
    for (int rows = kTileRows / widened; rows > 1; rows--)
        if (shape.rows_a_scale() % rows == 0) return rows * widened;
    return widened;
}

inline int tile_rows(const Linear& l) { return tile_rows(l.shape, widened(l)); }

/// The configuration of a thread's tiles, while it works on its share of a product.
class Tiling {
  public:
    Tiling() = default;
    Tiling(const Tiling&) = delete;
    Tiling& operator=(const Tiling&) = delete;
    ~Tiling() {
        if (use_ != Use::nothing) Tiles::release();
    }

    /// Two tiles of so many tokens each, weights of so many rows. Tiles keep nothing over a change.
    void shape(int first, int second, int rows) {
        if (is(Use::tokens, first, second, rows)) return;
        TileShapes shapes;
        for (int i = 0; i < 4; i++) set(shapes, kSums + i, i < 2 ? first : second, kBlock);
        for (int i = 0; i < 2; i++) set(shapes, kTokens + i, i ? second : first, rows), set(shapes, kWeights + i, rows, kBlock);
        Tiles::configure(shapes);
    }

    /// The same for attention's values (attend_tiles.h): of each tile of rows a tile of sums and two of chances; two of values.
    void values(int first, int second) {
        if (is(Use::values, first, second, kTileRows)) return;
        TileShapes shapes;
        for (int i = 0; i < 6; i++) set(shapes, i, i == 0 || i == 2 || i == 3 ? first : second, kBlock);
        for (int i = 6; i < 8; i++) set(shapes, i, kTileRows, kBlock);
        Tiles::configure(shapes);
    }

    /// The same for its keys where they lie (attend_direct.h): tiles of 16 of them, and of the words of some heads' queries.
    void keys(int heads, int rows) {
        if (is(Use::keys, heads, kTileTokens, rows)) return;
        TileShapes shapes;
        for (int i = 0; i < 4; i++) set(shapes, kSums + i, kTileTokens, heads);
        for (int i = 0; i < 2; i++) set(shapes, kTokens + i, kTileTokens, rows), set(shapes, kWeights + i, rows, heads);
        Tiles::configure(shapes);
    }

  private:
    enum class Use { nothing, tokens, values, keys };

    /// Is it configured like that? From now on it counts as such.
    bool is(Use use, int first, int second, int rows) {
        const bool whole = first == kTileTokens && second == kTileTokens && rows == kTileRows;  // all tiles are alike, whatever they hold
        const bool same = first == first_ && second == second_ && rows == rows_ && (whole || use == use_);
        use_ = use, first_ = first, second_ = second, rows_ = rows;
        return same;
    }

    static void set(TileShapes& shapes, int tile, int rows, int words) {
        shapes.rows[tile] = uint8_t(rows);
        shapes.row_bytes[tile] = uint16_t(4 * words);
    }

    Use use_ = Use::nothing;
    int first_ = 0, second_ = 0, rows_ = 0;
};

inline Layout layout_of(const Linear& l, void* scratch) {
    if (!tiled(l)) return on_vectors::layout_of(l, scratch);
    const int64_t count = (l.tokens + kMostTokens - 1) / kMostTokens, pair = 2 * kTileTokens;
    return layout_for(l, scratch, (l.tokens + count * pair - 1) / (count * pair) * pair);
}

/// A token's words to their places in tiles of `row` words for each of `count` tokens.
inline void spread_words(const char* from, int64_t words, int64_t row, int64_t count, char* to) {
    const int64_t step = 4 * count * row;
    if (row == kTileRows)  // nearly always; a copy of so few bytes would be a call
        for (int64_t word = 0; word < words; word += kTileRows, to += step) Lanes::store_int(to, Lanes::load_int(from + 4 * word));
    else
        for (int64_t word = 0; word < words; word += row, to += step) std::memcpy(to, from + 4 * word, size_t(4 * row));
}

/// The tokens from `first` on that share a tile.
inline void pack_tokens(const Linear& l, const Layout& s, int64_t first, int64_t count) {
    const int64_t row = tile_rows(l), tile = first / s.tile, unit = std::min(s.tile, l.tokens - tile * s.tile);
    uint32_t words[1 << 15];  // of one token: inputs are fewer than 2^16 (ops/packing.py)
    for (int64_t m = 0; m < count; m++) {
        const int64_t token = first + m, sums = tile * s.tile * s.scales + token % s.tile;
        const void* x = token_of(l, token);
        if (l.whole) round_token(l, x, s, 1, words, s.scale + token, unit, s.whole + sums);
        else if (in_pairs(l)) pack_words(l, x, s, 1, words), sum_token(l, x, s, unit, s.real + sums);
        if (l.shape.scale_inputs) x = words;
        char* to = reinterpret_cast<char*>(s.packed + first * s.words + m * row);
        spread_words(static_cast<const char*>(x), s.words, row, count, to);
    }
}

inline void pack(const Linear& l, void* scratch, int part, int parts) {
    if (!tiled(l)) return on_vectors::pack(l, scratch, part, parts);
    const Layout s = layout_of(l, scratch);
    const auto own = team::share((l.tokens + kTileTokens - 1) / kTileTokens, part, parts);
    for (int64_t i = own.first; i < own.last; i++) pack_tokens(l, s, i * kTileTokens, std::min<int64_t>(kTileTokens, l.tokens - i * kTileTokens));
}

/// What tiles hold. kWhole: codes and 8-bit activations. kStreams: weights come from memory as they are, and are asked for ahead. Else
/// `widen` makes kWiden rows of each of theirs, which stay in the first cache.
struct TilesOfBf16 {
    using Acc = Lanes::F;
    static constexpr bool kWhole = false, kCoded = false, kStreams = true;
    static constexpr int kWiden = 1;
    template <int C, int A, int B> static void dot() { Tiles::dot_bf16<C, A, B>(); }
};

/// Attention's keys: they have just been gathered.
struct TilesOfKeys : TilesOfBf16 {
    static constexpr bool kStreams = false;
};

struct TilesOfBytes {
    using Acc = Lanes::I;
    static constexpr bool kWhole = true, kCoded = true, kStreams = true;
    static constexpr int kWiden = 1;
    template <int C, int A, int B> static void dot() { Tiles::dot_bytes<C, A, B>(); }
};

/// 4-bit codes as bytes.
struct TilesOfNibbles : TilesOfBytes {
    static constexpr bool kStreams = false;
    static constexpr int kWiden = 2;
    static void widen(const uint8_t* from, int64_t rows, uint8_t* to) {
        const auto mask = Lanes::set1_int(0x0f0f0f0f);
        for (int64_t row = 0; row < rows; row++, from += kRowBytes, to += 2 * kRowBytes)
            for (int b = 0; b < kRowBytes; b += 64) {
                __builtin_prefetch(from + kAhead + b, 0, 3);
                const Lanes::I both = Lanes::load_int(from + b);
                const Lanes::I low = Lanes::and_int(both, mask), high = Lanes::and_int(Lanes::shift_right<4>(both), mask);
                std::memcpy(to + b, &low, 64);
                std::memcpy(to + kRowBytes + b, &high, 64);
            }
    }
};

/// Codes, FP8 among them, as pairs of bf16.
template <class Dot>
struct TilesOfPairs : TilesOfBf16 {
    static constexpr bool kCoded = true, kStreams = false;
    static constexpr int kWiden = Dot::kWords;
    static void widen(const uint8_t* from, int64_t rows, uint8_t* to) { on_vectors::unpack_pairs<Dot, kAhead>(from, rows, to); }
};

/// The tokens of one tile of the layout.
struct Unit {
    const uint8_t* packed;
    int64_t tokens, token_bytes;
    int rows;  // of a tile of weights

    int count(int64_t token) const { return int(std::min<int64_t>(kTileTokens, tokens - token)); }
    const uint8_t* tile(int64_t token, int64_t index) const { return packed + token * token_bytes + index * count(token) * rows * 4; }
};

/// Tiles of inputs that follow each other: `first`, `count` of them, with their weights. `begin`: there are no sums yet.
struct Span {
    int64_t first, count;
    const uint8_t* weights;
    bool begin;
    const uint8_t* next;  // weights that come after these, asked for while the first tokens meet these
};

/// sums[token][output] += of one tile of tokens and four blocks of outputs (High = 1), or of two and two (High = 2).
template <class Op, int High>
inline void add_tiles(const Unit& u, const Span& span, int64_t token, int block, void* sums) {
    constexpr int Wide = 4 / High;
    const int64_t row = 4 * u.rows, tile_bytes = u.rows * kRowBytes;
    const uint8_t* tokens[High];
    int64_t step[High];
    EACH(i, High) {
        tokens[i] = u.tile(token + i * kTileTokens, span.first);
        step[i] = u.count(token + i * kTileTokens) * row;
    });
    const uint8_t* weights = span.weights + block * 64;
    const auto corner = [&](int i) {
        return static_cast<char*>(sums) + ((token + i / Wide * kTileTokens) * kGroup + (block + i % Wide) * kBlock) * 4;
    };
    EACH(i, 4) {
        if (span.begin) Tiles::zero<kSums + decltype(i)::value>();
        else Tiles::load<kSums + decltype(i)::value>(corner(i), 4 * kGroup);
    });
    for (int64_t k = 0; k < span.count; k++, weights += tile_bytes) {
        EACH(i, High) {
            Tiles::load<kTokens + decltype(i)::value>(tokens[i], row);
            tokens[i] += step[i];
        });
        if constexpr (High == 2 && Op::kStreams)
            if (token == 0)  // half a tile's lines for each half of its blocks
                for (int64_t at = 0; at < tile_bytes / 2; at += 64)
                    __builtin_prefetch(span.next + k * tile_bytes + block / 2 * tile_bytes / 2 + at, 0, 2);
        EACH(j, Wide) {
            constexpr int Weights = kWeights + decltype(j)::value % 2;
            if constexpr (High == 1 && Op::kStreams)  // one quarter of the next tile's lines for each block: it is 4 KB ahead, all of it
                for (int64_t at = 0; at < 16 * row; at += 64) __builtin_prefetch(weights + tile_bytes + j * 16 * row + at, 0, 3);
            Tiles::load<Weights>(weights + j * 64, kRowBytes);
            EACH(i, High) { Op::template dot<kSums + decltype(i)::value * Wide + decltype(j)::value, kTokens + decltype(i)::value, Weights>(); });
        });
    }
    EACH(i, 4) { Tiles::store<kSums + decltype(i)::value>(corner(i), 4 * kGroup); });
}

/// All tokens of a unit and all outputs of a group; done(token, count, block, blocks) after each part of them.
template <class Op, class Done>
inline void add_span(const Unit& u, const Span& span, void* sums, Tiling& tiling, Done done) {
    const int64_t pairs = (u.tokens + kTileTokens - 1) / kTileTokens / 2;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t token = pair * 2 * kTileTokens;
        const int second = u.count(token + kTileTokens);
        tiling.shape(kTileTokens, second, u.rows);
        for (int block = 0; block < kGroup / kBlock; block += 2) {  // these tokens are in the first cache the second time
            add_tiles<Op, 2>(u, span, token, block, sums);
            done(token, kTileTokens + second, block, 2);
        }
    }
    const int64_t token = pairs * 2 * kTileTokens;
    if (token >= u.tokens) return;
    tiling.shape(u.count(token), u.count(token), u.rows);
    add_tiles<Op, 1>(u, span, token, 0, sums);
    done(token, u.count(token), 0, kGroup / kBlock);
}

/// Sums over what shares a scale, centred, scaled and added to a token's numbers, in the order of `finish` (micro.h).
template <class Op>
void scale_sums(const Shape& shape, const uint8_t* header, int64_t scale_index, const Sums& sums, int64_t tokens, int64_t token, int64_t count,
                int block, const void* parts, float* numbers) {
    const bool first = scale_index == 0, last = scale_index == shape.scales() - 1;
    const auto scale = Lanes::load(reinterpret_cast<const float*>(header) + block * kBlock);
    for (int64_t m = token; m < token + count; m++) {
        const int64_t place = m * kGroup + block * kBlock;
        const auto part = centred<Op>(shape, load_part<typename Op::Acc>(static_cast<const float*>(parts) + place), header, block, sums, scale_index * tokens + m);
        auto value = first ? Lanes::mul(part, scale) : Lanes::fma(part, scale, Lanes::load(numbers + place));
        if (Op::kWhole && last) value = Lanes::mul(value, Lanes::set1(sums.scale[m]));
        Lanes::store(numbers + place, value);
    }
}

/// Some groups of outputs that follow each other, and where their numbers go: [groups][kMostTokens][64].
struct Groups {
    const uint8_t* weights;
    int64_t count;
    float* numbers;

    static constexpr int64_t kNumbers = kMostTokens * kGroup;  // of a group
};

/// numbers[group][token][output] of a unit and some groups, chunk by chunk of the inputs: sums go to memory and back exactly. The tokens'
/// share of a chunk stays in the second cache for all groups, where all of it would not: 256 tokens of 3584 inputs are 1.8 MB.
template <class Op>
void multiply_groups(const Shape& shape, const Unit& u, const Sums& sums, const Groups& groups, Tiling& tiling) {
    alignas(64) static thread_local float parts_of_all[Op::kCoded ? kTogether * Groups::kNumbers : 1];  // or int32
    alignas(64) uint8_t wide[Op::kWiden > 1 ? kChunk * kTileRows * kRowBytes : 1];
    const int64_t scales = shape.scales(), rows = shape.rows_a_scale(), tiles = rows * Op::kWiden / u.rows, tile_bytes = u.rows / Op::kWiden * kRowBytes;
    const int64_t a_scale = shape.header_bytes() + rows * kRowBytes;
    const int64_t chunk = Op::kWiden > 1 || u.tokens > kTileTokens ? kChunk : tiles;  // one tile of tokens reads weights once, in order
    for (int64_t g = 0; g < scales; g++)
        for (int64_t tile = 0; tile < tiles; tile += chunk)
            for (int64_t i = 0; i < groups.count; i++) {
                const uint8_t* const header = groups.weights + i * shape.group_bytes() + g * a_scale;
                const uint8_t* const from = header + shape.header_bytes() + tile * tile_bytes;
                float *const numbers = groups.numbers + i * Groups::kNumbers, *const parts = Op::kCoded ? parts_of_all + i * Groups::kNumbers : numbers;
                const int64_t count = std::min(chunk, tiles - tile);
                const bool last = i + 1 == groups.count;
                Span span{g * tiles + tile, count, from, tile == 0, last ? from + count * tile_bytes - i * shape.group_bytes() : from + shape.group_bytes()};
                if constexpr (Op::kWiden > 1) {
                    Op::widen(from, count * (u.rows / Op::kWiden), wide);
                    span.weights = wide;
                }
                add_span<Op>(u, span, parts, tiling, [&](int64_t token, int64_t tokens, int block, int blocks) {
                    if (!Op::kCoded || tile + count < tiles) return;
                    for (int b = block; b < block + blocks; b++) scale_sums<Op>(shape, header, g, sums, u.tokens, token, tokens, b, parts, numbers);
                });
            }
}

/// The same for few tokens in bf16, which are no tile.
template <class Dot>
void multiply_few(const Linear& l, const Layout& s, const uint8_t* group, float* numbers) {
    using Op = TilesOfPairs<Dot>;
    alignas(64) float parts[kFewTokens * kGroup];
    const Shape& shape = l.shape;
    const int64_t rows = shape.rows_a_scale(), turn = tile_rows(l) / Dot::kWords;
    const Sums sums{nullptr, nullptr, s.real};
    const AddFew add = few_for<Dot>(l.tokens);
    const uint32_t* a = as_it_is(l) ? static_cast<const uint32_t*>(token_of(l, 0)) : s.packed;
    for (int64_t g = 0; g < shape.scales(); g++, a += rows * Dot::kWords * l.tokens) {
        const uint8_t* const weights = group + shape.header_bytes();
        float* const to = shape.scale_inputs ? parts : numbers;
        std::fill_n(to, l.tokens * kGroup, 0.0f);
        {
            const Flushed flushed;
            add(a, weights, rows, turn, to);
        }
        for (int b = 0; shape.scale_inputs && b < kGroup / kBlock; b++) scale_sums<Op>(shape, group, g, sums, l.tokens, 0, l.tokens, b, parts, numbers);
        group = weights + rows * kRowBytes;
    }
}

inline void multiply_untiled(const Linear& l, const Layout& s, int64_t tile, int64_t group, float* numbers) {
    const uint8_t* const weights = l.weight + group * l.shape.group_bytes();
    if (l.shape.kind == Weight::bf16) return multiply_few<DotPairs>(l, s, weights, numbers);
    if (!in_pairs(l)) return on_vectors::multiply(l, s, tile, group, numbers);
    return (l.shape.kind == Weight::int8 ? multiply_few<DotW8Pairs> : multiply_few<DotF8Pairs>)(l, s, weights, numbers);
}

using Multiply = void (*)(const Shape&, const Unit&, const Sums&, const Groups&, Tiling&);

inline Multiply multiply_for(const Linear& l) {
    switch (l.shape.kind) {
        case Weight::int8: return l.whole ? multiply_groups<TilesOfBytes> : multiply_groups<TilesOfPairs<DotW8Pairs>>;
        case Weight::int4: return l.whole ? multiply_groups<TilesOfNibbles> : multiply_groups<TilesOfPairs<DotW4Pairs>>;
        case Weight::fp8: return multiply_groups<TilesOfPairs<DotF8Pairs>>;
        default: return multiply_groups<TilesOfBf16>;
    }
}

/// Groups that are worked on together, where a tile's tokens would not stay in the second cache beside one after the other.
inline int64_t together(const Linear& l, const Layout& s) { return tiled(l) && std::min(s.tile, l.tokens) * s.words * 4 > kStays ? kTogether : 1; }

/// One tile of tokens times up to `together` groups of outputs: [groups][kMostTokens][64].
inline void multiply(const Linear& l, const Layout& s, int64_t tile, int64_t group, int64_t count, float* numbers, Tiling& tiling) {
    const uint8_t* const weights = l.weight + group * l.shape.group_bytes();
    if (!tiled(l)) {
        for (int64_t i = 0; i < count; i++) multiply_untiled(l, s, tile, group + i, numbers + i * Groups::kNumbers);
        return;
    }
    const int64_t first = tile * s.tile, tokens = std::min(s.tile, l.tokens - first);
    const Sums sums{s.scale + first, s.whole + first * s.scales, s.real + first * s.scales};
    const Unit u{reinterpret_cast<const uint8_t*>(s.packed + first * s.words), tokens, 4 * s.words, tile_rows(l)};
    multiply_for(l)(l.shape, u, sums, {weights, count, numbers}, tiling);
}

}  // namespace
