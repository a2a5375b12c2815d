// The products of attention on the tiles of AMX, for models in bf16.
//
// Keys of 64 positions lie as a group of packed weights does (packed.h), so scores are a product as in tiled.h. Values lie in pairs of
// positions, so 32 of them are the weights of a tile for 16 channels. A row's numbers depend on its own row of a tile alone.
#pragma once
#include <algorithm>

#include "attend_vectors.h"
#include "tiled.h"

namespace {
namespace on_tiles {

/// Queries as tiles of 16 rows: for each tile of keys their words, row by row.
inline void gather_queries(const Attention& a, const Item& item, Bench& bench) {
    const int64_t words = words_of(a), width = tile_rows(keys_of(a), 1);
    for (int64_t row = 0; row < item.rows(); row++) {
        const int64_t first = row / kTileTokens * kTileTokens, count = std::min<int64_t>(kTileTokens, item.rows() - first);
        const auto* q = static_cast<const char*>(query_of(a, item, row));
        spread_words(q, words, width, count, reinterpret_cast<char*>(bench.queries + first * words + (row - first) * width));
    }
}

inline void score(const Attention& a, const Item& item, Bench& bench, Tiling& tiling) {
    const int64_t words = words_of(a), rows = tile_rows(keys_of(a), 1);
    const Unit unit{reinterpret_cast<const uint8_t*>(bench.queries), item.rows(), 4 * words, int(rows)};
    const Span keys{0, words / rows, reinterpret_cast<const uint8_t*>(bench.keys), true, nullptr};
    add_span<TilesOfKeys>(unit, keys, bench.scores, tiling, [](int64_t, int64_t, int, int) {});
}

/// out *= shrink, where that is not 1.
inline void shrink_sums(const Attention& a, const Item& item, Bench& bench) {
    for (int64_t row = 0; row < item.rows(); row++) {
        if (bench.shrink[row] == 1.0f) continue;
        const auto factor = Lanes::set1(bench.shrink[row]);
        for (int64_t v = 0; v < a.value_width; v += 16) {
            float* out = bench.out_at(row, v);
            Lanes::store(out, Lanes::mul(Lanes::load(out), factor));
        }
    }
}

/// Chances times values, of up to two tiles of rows from `row` on: the chances stay in four tiles while channels go by.
template <int High>
inline void add_values(const Attention& a, int64_t row, Bench& bench) {
    constexpr int kSum = 0, kChances = 2, kValues = 6, kHalf = kStep / 2 / kTileRows;  // a step is two tiles of 32 positions
    static_assert(kHalf == 2);
    const auto* chances = reinterpret_cast<const char*>(bench.chances + row * kStep);
    EACH(i, High) {
        EACH(k, 2) { Tiles::load<kChances + 2 * decltype(i)::value + decltype(k)::value>(chances + i * kTileTokens * 4 * kStep + k * 64, 4 * kStep); });
    });
    for (int64_t v = 0; v < a.value_width; v += kBlock) {
        const auto* values = reinterpret_cast<const char*>(bench.values + v / kGroup * (kStep / 2) * kGroup + v % kGroup);
        float* out = bench.out_at(row, v);
        EACH(i, High) { Tiles::load<kSum + decltype(i)::value>(out + i * kTileTokens * kGroup, 4 * kGroup); });
        EACH(k, 2) {
            constexpr int K = decltype(k)::value;
            Tiles::load<kValues + K>(values + K * kTileRows * kRowBytes, kRowBytes);
            EACH(i, High) { Tiles::dot_bf16<kSum + decltype(i)::value, kChances + 2 * decltype(i)::value + K, kValues + K>(); });
        });
        EACH(i, High) { Tiles::store<kSum + decltype(i)::value>(out + i * kTileTokens * kGroup, 4 * kGroup); });
    }
}

/// The same for `rows` rows from `first` on.
inline void add_rows(const Attention& a, int64_t first, int64_t rows, Bench& bench, Tiling& tiling) {
    for (int64_t row = first; row < first + rows; row += 2 * kTileTokens) {
        const int64_t left = first + rows - row, high = std::min<int64_t>(kTileTokens, left), low = std::clamp<int64_t>(left - kTileTokens, 0, kTileTokens);
        tiling.values(int(high), int(low ? low : high));
        (low ? add_values<2> : add_values<1>)(a, row, bench);
    }
}

inline void score_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    Tiling tiling;
    gather_step(a, item, start, bench);
    score(a, item, bench, tiling);
}

inline void take_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    Tiling tiling;
    gather_step(a, item, start, bench);
    score(a, item, bench, tiling);
    shrink(a, item, start, bench);
    weigh(a, item, bench);
    shrink_sums(a, item, bench);
    add_rows(a, 0, item.rows(), bench, tiling);
}

}  // namespace on_tiles
}  // namespace
