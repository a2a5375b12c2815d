// Attention over pages: some rows (queries times the heads that share a key head) against 64 positions at a time.
//
// Steps of 64 stand at multiples of 64 and are taken in order of position, with a running maximum and sum a row (online
// softmax, arXiv 2205.14135, algorithm 1). What a row does not see adds exactly nothing to it, so its numbers do not
// depend on which other rows, chunks or requests are worked on beside it.
#pragma once
#include <algorithm>
#include <limits>

#include LINESHAFT_ATTEND
#include "coded.h"
#include "rows.h"

namespace {

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

/// 16 channels, from `v` on, of two positions: neighbours become pairs.
inline void pair_values(const void* even, const void* odd, int64_t v, int64_t width, uint32_t* out) {
    const auto *a = static_cast<const uint16_t*>(even) + v, *b = static_cast<const uint16_t*>(odd) + v;
    if (width - v >= 16) return Lanes::interleave(a, b, out);
    std::fill_n(out, 16, 0u);
    for (int64_t i = 0; i < width - v; i++) out[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
}

inline void gather_values(const Attention& a, const void* const* values, Bench& bench) {
    const bool pairs = in_pairs(a);
    const int rows = pairs ? kStep / 2 : kStep;
    for (int64_t v = 0; v < a.value_width; v += 16) {
        uint32_t* out = bench.values + v / kGroup * rows * kGroup + v % kGroup;
        for (int j = 0; j < rows; j++, out += kGroup) {
            if (pairs) pair_values(values[2 * j], values[2 * j + 1], v, a.value_width, out);
            else Lanes::store(reinterpret_cast<float*>(out), read_some(a.activation, values[j], v, a.value_width - v));
        }
    }
}

inline void gather_keys(const Attention& a, const uint32_t* const* keys, Bench& bench) {
    const int words = words_of(a);
    for (int j = 0; j < kStep; j += 16) {
        int w = 0;
        for (; w + 16 <= words; w += 16) Lanes::transpose(keys + j, w, bench.keys + w * kStep + j, kStep);
        for (; w < words; w++)
            for (int i = 0; i < 16; i++) bench.keys[w * kStep + j + i] = word_at(keys[j + i] + w);
    }
}

/// A head's entry in a slot of pages: where it lies or, of coded pages, where it was decoded to, which is place j of `room`.
inline const void* entry_at(const Attention& a, const void* pages, int64_t offset, uint32_t* room, int j) {
    if (!a.coded) return row_of(a.activation, pages, offset);
    const int64_t vectors = (a.key_width + 15) / 16 * 16;
    void* to = const_cast<void*>(row_of(a.activation, room, j * vectors));
    decode(a.activation, static_cast<const uint8_t*>(pages) + offset, a.key_width, to);
    return to;
}

/// The entries of 64 positions from `start` on: keys transposed, values in rows. What nobody of the item sees is zero.
inline void gather_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    alignas(64) static const uint32_t nothing[kMostKeyWidth] = {};
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    const bool all = open(a.reach, first, last, start);
    const uint32_t* keys[kStep];
    const void* values[kStep];
    int64_t place = start % a.page_tokens;
    const int32_t* page = a.tables + item.chunk->table + start / a.page_tokens;
    for (int j = 0; j < kStep; j++, place++) {
        if (place == a.page_tokens) place = 0, page++;
        if (!all && !touched(a.reach, first, last, start + j, 1)) {
            keys[j] = nothing;
            values[j] = nothing;
            continue;
        }
        const int64_t slot = *page * a.page_tokens + place;
        const int64_t key = slot * a.key_stride + item.kv_head * a.key_head_stride, value = slot * a.value_stride + item.kv_head * a.value_head_stride;
        const void* found = entry_at(a, a.keys, key, bench.found_keys, j);
        keys[j] = static_cast<const uint32_t*>(found);
        values[j] = a.coded && a.keys == a.values ? found : entry_at(a, a.values, value, bench.found_values, j);
    }
    gather_keys(a, keys, bench);
    gather_values(a, values, bench);
}

/// Infinity for the first `seen` of 64 places, minus infinity behind them.
inline const float* limits(int64_t seen) {
    struct Table {
        float of[2 * kStep];
        constexpr Table() : of() { for (int i = 0; i < 2 * kStep; i++) of[i] = i < kStep ? INFINITY : -INFINITY; }
    };
    alignas(64) static constexpr Table table;
    return table.of + kStep - std::clamp<int64_t>(seen, 0, kStep);
}

/// Scores of what position q does not see among the 64 from `start` on become minus infinity, whatever they were.
inline void hide(const Reach& r, int64_t q, int64_t start, float* scores) {
    if (r.kind == 2) {
        for (int j = 0; j < kStep; j++) scores[j] = sees(r, q, start + j) ? scores[j] : -INFINITY;
        return;
    }
    const float* upto = limits(q - start + 1);
    const float *before_window = limits(r.kind == 1 ? q - r.a + 1 - start : 0), *global = limits(r.kind == 1 ? r.b - start : 0);
    for (int j = 0; j < kStep; j += 16) {
        const auto near = Lanes::sub(Lanes::set1(0.0f), Lanes::load(before_window + j));
        const auto limit = Lanes::min(Lanes::load(upto + j), Lanes::max(near, Lanes::load(global + j)));
        Lanes::store(scores + j, Lanes::min(Lanes::load(scores + j), limit));  // the limit also where a score is not a number
    }
}

/// Scales and hides scores, notes each row's largest one so far, and what its earlier sums are multiplied by on account of that.
inline void shrink(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    const bool all = open(a.reach, item.position(0), item.position(item.rows() - 1), start);
    for (int64_t row = 0; row < item.rows(); row++) {
        float* scores = bench.scores + row * kStep;
        const int64_t q = item.position(row);
        if (!all && !open(a.reach, q, q, start)) hide(a.reach, q, start, scores);
        auto most = Lanes::set1(-INFINITY);
        for (int j = 0; j < kStep; j += 16) {
            const auto scaled = Lanes::mul(Lanes::load(scores + j), Lanes::set1(a.scale));
            Lanes::store(scores + j, scaled);
            most = Lanes::max(most, scaled);
        }
        bench.tops[row] = Lanes::largest(most);
    }
    for (int64_t row = 0; row < item.rows(); row += 16) {
        const auto before = Lanes::load(bench.largest + row), most = Lanes::max(Lanes::load(bench.tops + row), before);
        Lanes::store(bench.largest + row, most);
        Lanes::store(bench.shrink + row, exponential(Lanes::sub(before, most)));  // exactly 1 where nothing changes
    }
}

/// Scores become chances.
inline void weigh(const Attention& a, const Item& item, Bench& bench) {
    const bool pairs = in_pairs(a);
    for (int64_t row = 0; row < item.rows(); row++) {
        float* total = bench.sums + row * 16;
        uint32_t* chances = bench.chances + row * kStep;
        auto sum = Lanes::mul(Lanes::load(total), Lanes::set1(bench.shrink[row]));
        for (int j = 0; j < kStep; j += 16) {
            const auto chance = exponential(Lanes::sub(Lanes::load(bench.scores + row * kStep + j), Lanes::set1(bench.largest[row])));
            sum = Lanes::add(sum, chance);
            if (pairs) Lanes::narrow(reinterpret_cast<uint16_t*>(chances) + j, chance);
            else Lanes::store(reinterpret_cast<float*>(chances) + j, chance);
        }
        Lanes::store(total, sum);
    }
}

inline void take_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    gather_step(a, item, start, bench);
    score(a, item, bench);
    shrink(a, item, start, bench);
    weigh(a, item, bench);
    add(a, item, bench);
}

inline void attend(const Attention& a, const Item& item, Bench& bench) {
    for (int64_t v = 0; v < a.value_width; v += kGroup) std::fill_n(bench.out + v * kMostRows, item.rows() * kGroup, 0.0f);
    std::fill_n(bench.sums, item.rows() * 16, 0.0f);
    std::fill_n(bench.largest, item.rows(), std::numeric_limits<float>::lowest());  // finite: a row whose first steps are all hidden must not make NaN
    gather_queries(a, item, bench);
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    for (int64_t start = 0; start <= last; start += kStep)
        if (touched(a.reach, first, last, start, kStep)) take_step(a, item, start, bench);
    for (int64_t row = 0; row < item.rows(); row++) {
        const auto total = Lanes::set1(Lanes::sum(Lanes::load(bench.sums + row * 16)));
        for (int64_t v = 0; v < a.value_width; v += 16) {
            const float* from = bench.out + v / kGroup * kGroup * kMostRows + row * kGroup + v % kGroup;
            write_some(a.activation, a.out, (item.token(row) * a.heads + item.head(a, row)) * a.value_width + v, a.value_width - v, Lanes::div(Lanes::load(from), total));
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
