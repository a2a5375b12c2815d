// Attention of one query of a request, most of what serving does, on the tiles of AMX: keys are read where they lie, 16 positions a tile of
// activations, and queries are the weights that they meet. Several key heads go together, so that pages are read from beginning to end.
//
// Products and their order are those of attend_tiles.h, and so are all bits: a * b is b * a.
#pragma once
#include "attend_tiles.h"

namespace {
namespace on_tiles {

constexpr int64_t kMostKeyHeads = 16;  // of an item
constexpr int kBlocks = kStep / kTileTokens;
constexpr int64_t kFewHeads = 4;  // that share a key head: their values are added up by vectors, which need no pairs of positions

/// The entries of 64 positions that one key head looks at.
struct Found {
    const char* keys[kBlocks];    // of the first of 16 positions; null: nobody sees any of them
    const void* values[kStep];    // zeros where nobody sees them
};

inline int64_t shared_heads(const Attention& a, const Item& item) { return std::min(item.heads, a.heads / a.kv_heads); }

inline bool direct(const Attention& a) {
    return in_pairs(a) && !a.coded && a.page_tokens % kTileTokens == 0 && a.heads / a.kv_heads <= kTileTokens;
}

/// The part of an item of several key heads that is the `part`-th one's.
inline Item of_one(const Attention& a, const Item& item, int64_t part) {
    return {item.chunk, item.kv_head + part, item.first_head, shared_heads(a, item), item.first, 1};
}

/// Queries of each key head, their words of one pair of channels together.
inline void gather_directly(const Attention& a, const Item& item, Bench& bench) {
    const int64_t words = words_of(a), heads = shared_heads(a, item);
    for (int64_t row = 0; row < item.heads; row++) {
        const auto* q = static_cast<const uint32_t*>(query_of(a, item, row));
        uint32_t* to = bench.queries + row / heads * heads * words + row % heads;
        for (int64_t word = 0; word < words; word++) to[word * heads] = word_at(q + word);
    }
}

inline void find(const Attention& a, const Item& item, int64_t start, Found& found) {
    const int64_t q = item.position(0);
    const bool all = open(a.reach, q, q, start);
    for (int block = 0; block < kBlocks; block++) {
        const int64_t first = start + block * kTileTokens;
        found.keys[block] = nullptr;
        if (!touched(a.reach, q, q, first, kTileTokens)) {
            std::fill_n(found.values + block * kTileTokens, kTileTokens, nothing());
            continue;
        }
        const Where at = where(a, item, first);
        found.keys[block] = static_cast<const char*>(row_of(a.activation, a.keys, at.key));
        for (int j = 0; j < kTileTokens; j++)
            found.values[block * kTileTokens + j] =
                all || sees(a.reach, q, first + j) ? row_of(a.activation, a.values, at.value + j * a.value_stride) : nothing();
    }
}

/// scores[row][64] of the queries of one key head, whose first row is `row`.
inline void score_directly(const Attention& a, const Item& item, const Found& found, int64_t row, Bench& bench, Tiling& tiling) {
    constexpr int kSum = 0, kKeys = 4, kQueries = 6;
    alignas(64) float sums[kStep][kBlock], turned[kBlock][kStep];
    const int64_t words = words_of(a), width = tile_rows(keys_of(a), 1), heads = item.heads;
    const uint32_t* queries = bench.queries + row * words;
    tiling.keys(int(heads), int(width));
    EACH(b, kBlocks) { Tiles::zero<kSum + decltype(b)::value>(); });
    for (int64_t word = 0; word < words; word += width) {
        Tiles::load<kQueries>(queries + word * heads, 4 * heads);
        EACH(b, kBlocks) {
            constexpr int Keys = kKeys + decltype(b)::value % 2;
            if (!found.keys[b]) return;
            Tiles::load<Keys>(found.keys[b] + 4 * word, 2 * a.key_stride);
            Tiles::dot_bf16<kSum + decltype(b)::value, Keys, kQueries>();
        });
    }
    EACH(b, kBlocks) { Tiles::store<kSum + decltype(b)::value>(sums[b * kTileTokens], 4 * kBlock); });
    float* const scores = bench.scores + row * kStep;
    if (heads <= kFewHeads) {
        for (int64_t head = 0; head < heads; head++)
            for (int j = 0; j < kStep; j++) scores[head * kStep + j] = sums[j][head];
        return;
    }
    for (int j = 0; j < kStep; j += kBlock) {
        const uint32_t* rows[kBlock];
        for (int i = 0; i < kBlock; i++) rows[i] = reinterpret_cast<const uint32_t*>(sums[j + i]);
        Lanes::transpose(rows, 0, reinterpret_cast<uint32_t*>(turned[0] + j), kStep);
    }
    std::memcpy(scores, turned, size_t(heads) * kStep * sizeof(float));
}

/// out += chances times values of M heads and B blocks of channels from `v` on, in the order of tiles (few.h).
template <int M, int B>
inline void add_channels(const Found& found, const uint32_t* chances, int64_t v, float* out) {
    constexpr int kPairs = kTileRows;  // of positions, a tile of values
    for (int first = 0; first < kStep / 2; first += kPairs) {
        Lanes::F even[M][B], odd[M][B];
        EACH(m, M) { EACH(b, B) { even[m][b] = odd[m][b] = Lanes::set1(0.0f); }); });
        for (int pair = first; pair < first + kPairs; pair++) {
            const auto *at_even = static_cast<const uint16_t*>(found.values[2 * pair]) + v, *at_odd = static_cast<const uint16_t*>(found.values[2 * pair + 1]) + v;
            Halves of[M];
            EACH(m, M) { of[m] = halves(Lanes::set1_int(int32_t(chances[m * kStep + pair]))); });
            EACH(b, B) {
                const auto value = Lanes::from_bf16(at_even + b * kBlock), other = Lanes::from_bf16(at_odd + b * kBlock);
                EACH(m, M) {
                    even[m][b] = Lanes::fma(of[m].low, value, even[m][b]);
                    odd[m][b] = Lanes::fma(of[m].high, other, odd[m][b]);
                });
            });
        }
        add_chains<M, B>(even, odd, out);
    }
}

template <int M>
inline void add_heads(const Attention& a, const Found& found, int64_t row, Bench& bench) {
    constexpr int B = M > 2 ? 2 : 4;  // two chains of each stay in registers
    const Flushed flushed;
    const uint32_t* chances = bench.chances + row * kStep;
    int64_t v = 0;
    for (; v + B * kBlock <= a.value_width; v += B * kBlock) add_channels<M, B>(found, chances, v, bench.out_at(row, v));
    for (; v < a.value_width; v += kBlock) add_channels<M, 1>(found, chances, v, bench.out_at(row, v));
}

inline void add_directly(const Attention& a, const Item& item, const Found& found, int64_t row, Bench& bench, Tiling& tiling) {
    if (item.heads > kFewHeads || a.value_width % kBlock) {
        gather_values(a, found.values, bench);
        return add_rows(a, row, item.heads, bench, tiling);
    }
    constexpr void (*few[])(const Attention&, const Found&, int64_t, Bench&) = {add_heads<1>, add_heads<2>, add_heads<3>, add_heads<4>};
    few[item.heads - 1](a, found, row, bench);
}

/// Reads the entries of a step once, in the order of their addresses, so that they are in the second cache. Its look-ahead follows loads that
/// walk through memory, and neither the walk from head to head nor prefetch instructions: 1.8 instead of 2.3 us a step and head.
inline void read_through(const Attention& a, const Item& item, int64_t start) {
    const int64_t end = std::min(start + kStep, item.position(0) + 1), heads = item.heads / shared_heads(a, item);
    Lanes::I sum = Lanes::set1_int(0);
    const auto read = [&](bool keys) {
        const int64_t bytes = 2 * (keys ? a.key_head_stride * (heads - 1) + a.key_width : a.value_head_stride * (heads - 1) + a.value_width);
        for (int64_t position = start; position < end; position++) {
            if (!sees(a.reach, item.position(0), position)) continue;
            const Where at = where(a, item, position);
            const auto* from = static_cast<const char*>(row_of(a.activation, keys ? a.keys : a.values, keys ? at.key : at.value));
            for (int64_t i = 0; i + 64 <= bytes; i += 64) sum = Lanes::xor_int(sum, Lanes::load_int(from + i));
        }
    };
    read(true);
    if (a.keys != a.values) read(false);
    asm volatile("" ::"v"(sum));  // as if it were used
}

inline void take_directly(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    const int64_t heads = shared_heads(a, item), parts = item.heads / heads;
    Found found[kMostKeyHeads];
    Tiling tiling;
    if (parts > 1) read_through(a, item, start);
    for (int64_t part = 0; part < parts; part++) {
        find(a, of_one(a, item, part), start, found[part]);
        score_directly(a, of_one(a, item, part), found[part], part * heads, bench, tiling);
    }
    shrink(a, item, start, bench);
    weigh(a, item, bench);
    shrink_sums(a, item, bench);
    for (int64_t part = 0; part < parts; part++) add_directly(a, of_one(a, item, part), found[part], part * heads, bench, tiling);
}

}  // namespace on_tiles

inline Way way_for(const Attention& a, const Item& item) {
    if (!in_pairs(a)) return {on_vectors::gather_queries, on_vectors::take_step};
    if (item.count == 1 && on_tiles::direct(a)) return {on_tiles::gather_directly, on_tiles::take_directly};
    return {on_tiles::gather_queries, on_tiles::take_step};
}

/// For scores alone, of any item.
inline Way way_of_scores(const Attention& a) {
    if (!in_pairs(a)) return {on_vectors::gather_queries, on_vectors::score_step};
    return {on_tiles::gather_queries, on_tiles::score_step};
}

/// Key heads of one query that an item may have.
inline int64_t key_heads_together(const Attention& a) { return on_tiles::direct(a) ? on_tiles::kMostKeyHeads : 1; }

}  // namespace
