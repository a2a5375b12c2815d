// Attention over pages: some rows (queries times the heads that share a key head) against 64 positions at a time.
//
// Steps of 64 stand at multiples of 64 and are taken in order of position, with a running maximum and sum a row. What a row does not see
// adds exactly nothing to it, so its numbers do not depend on which other rows, chunks or requests are worked on beside it.
#pragma once
#include <algorithm>
#include <limits>

#include LINESHAFT_ATTEND

namespace {

inline void attend(const Attention& a, const Item& item, Bench& bench) {
    const Way way = way_for(a, item);
    for (int64_t v = 0; v < a.value_width; v += kGroup) std::fill_n(bench.out + v * kMostRows, item.rows() * kGroup, 0.0f);
    std::fill_n(bench.sums, item.rows() * 16, 0.0f);
    std::fill_n(bench.largest, item.rows(), std::numeric_limits<float>::lowest());  // finite: a row whose first steps are all hidden must not make NaN
    way.gather_queries(a, item, bench);
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    for (int64_t start = 0; start <= last; start += kStep)
        if (touched(a.reach, first, last, start, kStep)) way.take_step(a, item, start, bench);
    for (int64_t row = 0; row < item.rows(); row++) {
        const auto share = Lanes::set1(1.0f / Lanes::sum(Lanes::load(bench.sums + row * 16)));
        for (int64_t v = 0; v < a.value_width; v += 16) {
            const float* from = bench.out_at(row, v);
            write_some(a.activation, a.out, (item.token(row) * a.heads + item.head(a, row)) * a.value_width + v, a.value_width - v, Lanes::mul(Lanes::load(from), share));
        }
    }
}

/// Heads and queries of an item, so that threads have enough of them to share.
inline void attention(const Attention& a, int part, int parts) {
    Bench& bench = bench_of_thread();
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
    const int64_t together = pieces == 1 ? std::clamp<int64_t>(a.kv_heads * a.chunk_count / a.threads, 1, key_heads_together(a)) : 1;
    int64_t number = 0;
    for (int64_t c = 0; c < a.chunk_count; c++) {
        const Chunk& chunk = a.chunks[c];
        const int64_t at_once = chunk.count == 1 ? together : 1;
        // in turns: neighbours see about equally much
        for (int64_t q = 0; q < chunk.count; q += queries)
            for (int64_t k = 0; k < a.kv_heads; k += at_once)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    if (number++ % parts != part) continue;
                    const int64_t first_head = piece * heads, own = std::min(heads, shared - first_head) * std::min(at_once, a.kv_heads - k);
                    attend(a, {&chunk, k, first_head, own, q, std::min(queries, chunk.count - q)}, bench);
                }
    }
}

}  // namespace
