// Scores of a step become chances, with a running maximum and sum a row (online softmax, arXiv 2205.14135, algorithm 1).
#pragma once
#include <algorithm>
#include <cmath>

#include "reach.h"
#include "rows.h"

namespace {

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

/// Hides scores, notes each row's largest one so far, scaled, and what its earlier sums are multiplied by on account of that.
inline void shrink(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    const bool all = open(a.reach, item.position(0), item.position(item.rows() - 1), start);
    for (int64_t row = 0; row < item.rows(); row++) {
        float* scores = bench.scores + row * kStep;
        const int64_t q = item.position(row);
        if (!all && !open(a.reach, q, q, start)) hide(a.reach, q, start, scores);
        auto most = Lanes::set1(-INFINITY);
        for (int j = 0; j < kStep; j += 16) most = Lanes::max(most, Lanes::mul(Lanes::load(scores + j), Lanes::set1(a.scale)));
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
            const auto scaled = Lanes::mul(Lanes::load(bench.scores + row * kStep + j), Lanes::set1(a.scale));
            const auto chance = exponential(Lanes::sub(scaled, Lanes::set1(bench.largest[row])));
            sum = Lanes::add(sum, chance);
            if (pairs) Lanes::narrow(reinterpret_cast<uint16_t*>(chances) + j, chance);
            else Lanes::store(reinterpret_cast<float*>(chances) + j, chance);
        }
        Lanes::store(total, sum);
    }
}

}  // namespace
