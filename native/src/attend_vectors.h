// The products of attention on vector registers: queries times keys, chances times values.
#pragma once
#include <algorithm>

#include "gather.h"
#include "softmax.h"
#include "vectors.h"

namespace {
namespace on_vectors {

inline void gather_queries(const Attention& a, const Item& item, Bench& bench) {
    const int words = words_of(a);
    for (int64_t start = 0; start < item.rows(); start += Lanes::kMaxRows) {
        const int64_t count = std::min<int64_t>(Lanes::kMaxRows, item.rows() - start);
        uint32_t* to = bench.queries + start * words;
        for (int64_t m = 0; m < count; m++) {
            const auto* q = static_cast<const uint32_t*>(query_of(a, item, start + m));
            for (int w = 0; w < words; w++) to[w * count + m] = word_at(q + w);
        }
    }
}

inline void score(const Attention& a, const Item& item, Bench& bench) {
    const int words = words_of(a);
    const Shape shape = keys_of(a);
    const auto* keys = reinterpret_cast<const uint8_t*>(bench.keys);
    const Piece piece{shape, keys, shape.rows_a_scale(), nullptr, 0, true, true, {keys, 0}};
    for (int64_t row = 0; row < item.rows(); row += Lanes::kMaxRows) {
        const int count = int(std::min<int64_t>(Lanes::kMaxRows, item.rows() - row));
        const auto take = shape.kind == Weight::f32 ? take_for<DotF32, false>(count) : take_for<DotBf16, false>(count);
        take(piece, {bench.queries + row * words, Sums{}, nullptr, bench.scores + row * kStep});
    }
}

/// out = out * shrink + chances times values, of M rows and 64 channels, in the order of the positions.
template <class Dot, int M>
void add_values(const uint32_t* values, const uint32_t* chances, const float* shrink, float* out) {
    constexpr int B = blocks_for(M), kRows = kStep / Dot::kInputs;
    for (int first = 0; first < kGroup / kBlock; first += B) {
        Lanes::F acc[M][B];
        EACH(m, M) {
            EACH(b, B) { acc[m][b] = Lanes::mul(Lanes::load(out + m * kGroup + (first + b) * kBlock), Lanes::set1(shrink[m])); });
        });
        const auto* w = reinterpret_cast<const uint8_t*>(values) + first * 64;
        for (int row = 0; row < kRows; row++, w += kRowBytes) {
            typename Dot::W weights[B];
            EACH(b, B) { weights[b] = Dot::weights(w + b * 64); });
            EACH(m, M) {
                const typename Dot::A chance = Dot::spread(chances + m * kStep + row, 1);
                EACH(b, B) { acc[m][b] = Dot::dot(acc[m][b], weights[b], chance); });
            });
        }
        EACH(m, M) { EACH(b, B) { Lanes::store(out + m * kGroup + (first + b) * kBlock, acc[m][b]); }); });
    }
}

using Adder = void (*)(const uint32_t*, const uint32_t*, const float*, float*);

template <class Dot>
Adder adder_for(int rows) {
    switch (rows) {
        case 1: return add_values<Dot, 1>;
        case 2: return add_values<Dot, 2>;
        default: break;
    }
    if constexpr (Lanes::kMaxRows >= 4) {
        if (rows == 3) return add_values<Dot, 3>;
        if (rows == 4) return add_values<Dot, 4>;
    }
    if constexpr (Lanes::kMaxRows >= 6) return rows == 5 ? add_values<Dot, 5> : add_values<Dot, 6>;
    return add_values<Dot, 2>;
}

inline void add(const Attention& a, const Item& item, Bench& bench) {
    const int rows = in_pairs(a) ? kStep / 2 : kStep;
    for (int64_t row = 0; row < item.rows(); row += Lanes::kMaxRows) {
        const int count = int(std::min<int64_t>(Lanes::kMaxRows, item.rows() - row));
        const Adder adder = in_pairs(a) ? adder_for<DotBf16>(count) : adder_for<DotF32>(count);
        for (int64_t v = 0; v < a.value_width; v += kGroup)
            adder(bench.values + v * rows, bench.chances + row * kStep, bench.shrink + row, bench.out + v * kMostRows + row * kGroup);
    }
}

inline void score_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    gather_step(a, item, start, bench);
    score(a, item, bench);
}

inline void take_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    score_step(a, item, start, bench);
    shrink(a, item, start, bench);
    weigh(a, item, bench);
    add(a, item, bench);
}

}  // namespace on_vectors
}  // namespace
