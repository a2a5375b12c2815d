// Attention over pages: some rows (queries times the heads that share a key head) against 64 positions at a time.
//
// Steps of 64 stand at multiples of 64 and are taken in order of position, with a running maximum and sum a row (online
// softmax, arXiv 2205.14135, algorithm 1). What a row does not see adds exactly nothing to it, so its numbers do not
// depend on which other rows, chunks or requests are worked on beside it.
#pragma once
#include <algorithm>
#include <limits>

#include "rows.h"
#include "vectors.h"

namespace {

constexpr int kStep = 64;        // positions worked on together: one group of the packed layout
constexpr int kMostRows = 32;    // rows that share what was gathered for a step
constexpr int kMostKeyWidth = 1024, kMostValueWidth = 1024;

inline bool sees(const Reach& r, int64_t q, int64_t k) {
    if (k > q) return false;
    if (r.kind == 1) return q - k < r.a || k < r.b;
    if (r.kind == 2) return q / r.a - k / r.a < r.b || (k / r.a) % r.c == 0;
    return true;
}

/// May a query from `first` to `last` see a position from `start` to before `start` + `count`?
inline bool touched(const Reach& r, int64_t first, int64_t last, int64_t start, int64_t count) {
    const int64_t end = std::min(start + count, last + 1);
    if (start >= end) return false;
    if (r.kind == 1) return end > first - r.a + 1 || start < r.b;
    if (r.kind != 2) return true;
    for (int64_t block = start / r.a; block <= (end - 1) / r.a; block++)
        if (block % r.c == 0 || first / r.a - block < r.b) return true;
    return false;
}

/// Does every query from `first` to `last` see all of `start` to before `start` + kStep?
inline bool open(const Reach& r, int64_t first, int64_t last, int64_t start) {
    if (start + kStep - 1 > first) return false;
    return r.kind == 0 || (r.kind == 1 && (last - start < r.a || start + kStep <= r.b));
}

/// What a thread works in. Reused from call to call.
struct Bench {
    alignas(64) uint32_t keys[kMostKeyWidth * kStep];            // transposed: [words][64 positions]
    alignas(64) float values[kMostValueWidth * kStep];           // [width / 64][64 positions][64]
    alignas(64) uint32_t queries[kMostRows * kMostKeyWidth];     // tiles of packed words
    alignas(64) float out[kMostRows * kMostValueWidth];          // [width / 64][rows][64]
    alignas(64) float scores[Lanes::kMaxRows * kStep];
    alignas(64) uint32_t chances[Lanes::kMaxRows * kStep];       // [64 positions][rows of the tile]
    alignas(64) float sums[kMostRows * 16];
    float largest[kMostRows];
};

struct Item {
    const Chunk* chunk;
    int64_t kv_head, first_head, heads;  // heads: of those that share the key head
    int64_t first, count;                // queries of the chunk

    int64_t rows() const { return heads * count; }
    int64_t position(int64_t row) const { return chunk->first + first + row / heads; }
};

template <int M>
void add_values(const float* values, const uint32_t* chances, const float* shrink, float* out) {
    constexpr int B = blocks_for(M);
    for (int first = 0; first < kGroup / kBlock; first += B) {
        Lanes::F acc[M][B];
        EACH(m, M) {
            EACH(b, B) { acc[m][b] = Lanes::mul(Lanes::load(out + m * kGroup + (first + b) * kBlock), Lanes::set1(shrink[m])); });
        });
        accumulate<DotF32, M, B>(chances, reinterpret_cast<const uint8_t*>(values) + first * 64, kStep, acc);
        EACH(m, M) { EACH(b, B) { Lanes::store(out + m * kGroup + (first + b) * kBlock, acc[m][b]); }); });
    }
}

using Adder = void (*)(const float*, const uint32_t*, const float*, float*);

inline Adder adder_for(int rows) {
    switch (rows) {
        case 1: return add_values<1>;
        case 2: return add_values<2>;
        default: break;
    }
    if constexpr (Lanes::kMaxRows >= 4) {
        if (rows == 3) return add_values<3>;
        if (rows == 4) return add_values<4>;
    }
    if constexpr (Lanes::kMaxRows >= 6) return rows == 5 ? add_values<5> : add_values<6>;
    return add_values<2>;
}

inline int words_of(const Attention& a) { return int(a.activation == Activation::f32 ? a.key_width : a.key_width / 2); }

inline void gather_queries(const Attention& a, const Item& item, Bench& bench) {
    const int words = words_of(a);
    for (int64_t start = 0; start < item.rows(); start += Lanes::kMaxRows) {
        const int64_t count = std::min<int64_t>(Lanes::kMaxRows, item.rows() - start);
        uint32_t* to = bench.queries + start * words;
        for (int64_t m = 0; m < count; m++) {
            const int64_t row = start + m, head = item.kv_head * (a.heads / a.kv_heads) + item.first_head + row % item.heads;
            const int64_t token = item.chunk->row + item.first + row / item.heads;
            const auto* q = static_cast<const uint32_t*>(row_of(a.activation, a.q, token * a.q_stride + head * a.key_width));
            for (int w = 0; w < words; w++) to[w * count + m] = word_at(q + w);
        }
    }
}

/// The entries of 64 positions from `start` on: keys transposed, values widened. What nobody of the item sees is zero.
inline void gather_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    alignas(64) static const uint32_t nothing[kMostKeyWidth] = {};
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    const uint32_t* keys[kStep];
    const void* values[kStep];
    for (int j = 0; j < kStep; j++) {
        const int64_t position = start + j;
        const int64_t page = !touched(a.reach, first, last, position, 1) ? -1 : a.tables[item.chunk->table + position / a.page_tokens];
        if (page < 0) {
            keys[j] = nothing;
            values[j] = nothing;
            continue;
        }
        const int64_t slot = page * a.page_tokens + position % a.page_tokens;
        keys[j] = static_cast<const uint32_t*>(row_of(a.activation, a.keys, slot * a.key_stride + item.kv_head * a.key_head_stride));
        values[j] = row_of(a.activation, a.values, slot * a.value_stride + item.kv_head * a.value_head_stride);
    }
    const int words = words_of(a);
    for (int j = 0; j < kStep; j += 16) {
        int w = 0;
        for (; w + 16 <= words; w += 16) Lanes::transpose(keys + j, w, bench.keys + w * kStep + j, kStep);
        for (; w < words; w++)
            for (int i = 0; i < 16; i++) bench.keys[w * kStep + j + i] = word_at(keys[j + i] + w);
    }
    for (int64_t v = 0; v < a.value_width; v += 16)
        for (int j = 0; j < kStep; j++)
            Lanes::store(bench.values + (v / kGroup * kStep + j) * kGroup + v % kGroup, read_some(a.activation, values[j], v, a.value_width - v));
}

/// Scores of one tile of rows become chances; `shrink` is what their earlier sums are multiplied by.
inline void weigh(const Attention& a, const Item& item, int64_t start, int64_t row, int count, bool all, Bench& bench, float* shrink) {
    for (int m = 0; m < count; m++) {
        float* scores = bench.scores + m * kStep;
        const int64_t q = item.position(row + m);
        if (!all)
            for (int j = 0; j < kStep; j++) scores[j] = sees(a.reach, q, start + j) ? scores[j] : -INFINITY;
        Lanes::F scaled[kStep / 16];
        for (int j = 0; j < kStep / 16; j++) scaled[j] = Lanes::mul(Lanes::load(scores + 16 * j), Lanes::set1(a.scale));
        const float now = Lanes::largest(Lanes::max(Lanes::max(scaled[0], scaled[1]), Lanes::max(scaled[2], scaled[3])));
        float& before = bench.largest[row + m];
        const float most = now > before ? now : before;
        alignas(64) float factor[16];
        Lanes::store(factor, exponential(Lanes::set1(before - most)));
        shrink[m] = most == before ? 1.0f : factor[0];
        before = most;
        auto sum = Lanes::mul(Lanes::load(bench.sums + (row + m) * 16), Lanes::set1(shrink[m]));
        for (int j = 0; j < kStep / 16; j++) {
            const auto chance = exponential(Lanes::sub(scaled[j], Lanes::set1(most)));
            sum = Lanes::add(sum, chance);
            alignas(64) uint32_t words[16];
            Lanes::store(reinterpret_cast<float*>(words), chance);
            for (int i = 0; i < 16; i++) bench.chances[(16 * j + i) * count + m] = words[i];
        }
        Lanes::store(bench.sums + (row + m) * 16, sum);
    }
}

inline void take_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    gather_step(a, item, start, bench);
    const bool all = open(a.reach, item.position(0), item.position(item.rows() - 1), start);
    const int words = words_of(a);
    const Shape shape{a.activation == Activation::f32 ? Weight::f32 : Weight::bf16, a.key_width, kGroup, 0, false};
    for (int64_t row = 0; row < item.rows(); row += Lanes::kMaxRows) {
        const int count = int(std::min<int64_t>(Lanes::kMaxRows, item.rows() - row));
        const Tile tile = shape.kind == Weight::f32 ? tile_for<DotF32, false>(count) : tile_for<DotBf16, false>(count);
        tile(shape, bench.queries + row * words, reinterpret_cast<const uint8_t*>(bench.keys), 0, Sums{}, bench.scores);
        float shrink[Lanes::kMaxRows];
        weigh(a, item, start, row, count, all, bench, shrink);
        for (int64_t v = 0; v < a.value_width; v += kGroup)
            adder_for(count)(bench.values + v * kStep, bench.chances, shrink, bench.out + v * kMostRows + row * kGroup);
    }
}

inline void attend(const Attention& a, const Item& item, Bench& bench) {
    std::fill_n(bench.out, kMostRows * ((a.value_width + kGroup - 1) / kGroup) * kGroup, 0.0f);
    std::fill_n(bench.sums, item.rows() * 16, 0.0f);
    std::fill_n(bench.largest, item.rows(), std::numeric_limits<float>::lowest());  // finite: a row whose first steps are all hidden must not make NaN
    gather_queries(a, item, bench);
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    for (int64_t start = 0; start <= last; start += kStep)
        if (touched(a.reach, first, last, start, kStep)) take_step(a, item, start, bench);
    for (int64_t row = 0; row < item.rows(); row++) {
        const int64_t head = item.kv_head * (a.heads / a.kv_heads) + item.first_head + row % item.heads;
        const int64_t token = item.chunk->row + item.first + row / item.heads;
        const auto total = Lanes::set1(Lanes::sum(Lanes::load(bench.sums + row * 16)));
        for (int64_t v = 0; v < a.value_width; v += 16) {
            const float* from = bench.out + v / kGroup * kGroup * kMostRows + row * kGroup + v % kGroup;
            write_some(a.activation, a.out, (token * a.heads + head) * a.value_width + v, a.value_width - v, Lanes::div(Lanes::load(from), total));
        }
    }
}

/// Heads and queries of an item, so that threads have enough of them to share.
inline void attention(const Attention& a, int part, int parts) {
    static thread_local Bench bench;
    const int64_t shared = a.heads / a.kv_heads;
    int64_t heads = std::min<int64_t>(shared, kMostRows);
    const auto items_with = [&](int64_t at_once) {
        const int64_t queries = std::max<int64_t>(1, kMostRows / at_once), pieces = (shared + at_once - 1) / at_once;
        int64_t items = 0;
        for (int64_t c = 0; c < a.chunk_count; c++) items += (a.chunks[c].count + queries - 1) / queries * pieces * a.kv_heads;
        return items;
    };
    while (heads > 1 && items_with(heads) < a.threads) heads = (heads + 1) / 2;
    const int64_t queries = std::max<int64_t>(1, kMostRows / heads), pieces = (shared + heads - 1) / heads;
    int64_t number = 0;
    for (int64_t c = 0; c < a.chunk_count; c++)
        // in turns: neighbours see about equally much
        for (int64_t q = 0; q < a.chunks[c].count; q += queries)
            for (int64_t k = 0; k < a.kv_heads; k++)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    if (number++ % parts != part) continue;
                    const int64_t first_head = piece * heads;
                    attend(a, {&a.chunks[c], k, first_head, std::min(heads, shared - first_head), q, std::min(queries, a.chunks[c].count - q)}, bench);
                }
}

}  // namespace
