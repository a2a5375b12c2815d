// The innermost loops: some tokens times some blocks of 16 outputs, over inputs that follow each other in packed rows.
#pragma once
#include <utility>

#include "dots.h"
#include "packed.h"

namespace {

// Bytes ahead of a stream that are asked for. 1 to 2 KB was best on a Sapphire Rapids, and much more as bad as nothing; not tuned elsewhere.
constexpr int kAhead = 2048;

/// Calls fn with 0, 1, ... N - 1 as constants: accumulators that are indexed by constants stay in registers (GCC 12 stores
/// them in each turn of a loop that it unrolls later).
template <int N, class Fn>
inline __attribute__((always_inline)) void times(Fn fn) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (fn(std::integral_constant<int, I>{}), ...); }
    (std::make_integer_sequence<int, N>{});
}

#define EACH(index, count) times<count>([&](auto index) __attribute__((always_inline))

/// acc[m][b] += activations of token m times block b, over `rows` packed rows from `w` on.
/// a: packed words, those of one row of all `M` tokens together: [rows][words a row][M].
template <class Dot, int M, int B>
inline __attribute__((always_inline)) void accumulate(const uint32_t* a, const uint8_t* w, int64_t rows, typename Dot::Acc (&acc)[M][B]) {
    for (int64_t row = 0; row < rows; row++) {
        EACH(b, B) { __builtin_prefetch(w + kAhead + b * 64, 0, 3); });
        typename Dot::W weights[B];
        EACH(b, B) { weights[b] = Dot::weights(w + b * 64); });
        EACH(m, M) {
            const typename Dot::A spread = Dot::spread(a + m, M);
            EACH(b, B) { acc[m][b] = Dot::dot(acc[m][b], weights[b], spread); });
        });
        a += M * Dot::kWords;
        w += kRowBytes;
    }
}

template <class Dot, int M, int B>
inline __attribute__((always_inline)) void clear(typename Dot::Acc (&acc)[M][B]) {
    EACH(m, M) { EACH(b, B) { acc[m][b] = Dot::zero(); }); });
}

/// What quantised weights need of the tokens besides their packed words.
struct Sums {
    const float* scale = nullptr;    // [M], of activations in 8 bits; null: they are as they were
    const int32_t* whole = nullptr;  // [scales][M]: sums of the 8-bit activations over each group of inputs
    const float* real = nullptr;     // [scales][M]: the same of float32 activations
};

/// The zero points of 16 outputs, less what the codes are centred on already.
inline Lanes::I zeros_of(const Shape& shape, const uint8_t* header, int block, int32_t centre) {
    if (shape.zeros) return Lanes::sub_int(Lanes::bytes(header + kGroup * 4 + block * kBlock), Lanes::set1_int(centre));
    return Lanes::set1_int((shape.kind == Weight::int8 ? 128 : 8) - centre);
}

/// A sum over codes, less what their zero point added to it; `place`: that of the token's sum over the same inputs.
template <class Dot>
inline __attribute__((always_inline)) Lanes::F centred(const Shape& shape, typename Dot::Acc acc, const uint8_t* header, int block, const Sums& sums,
                                                       int64_t place) {
    if constexpr (Dot::kWhole)
        return Lanes::to_float(Lanes::sub_int(acc, Lanes::mul_int(zeros_of(shape, header, block, 0), Lanes::set1_int(sums.whole[place]))));
    else if (!shape.zeros) return acc;
    else {
        const auto zero = Lanes::to_float(zeros_of(shape, header, block, shape.kind == Weight::int8 ? 128 : 8));
        return Lanes::sub(acc, Lanes::mul(zero, Lanes::set1(sums.real[place])));
    }
}

/// out[m * kGroup + ...] of M tokens and the B blocks from `first` on of one group of outputs.
template <class Dot, int M, int B>
void dense_tile(const Shape& shape, const uint32_t* a, const uint8_t* group, int first, const Sums&, float* out) {
    typename Dot::Acc acc[M][B];
    clear<Dot, M, B>(acc);
    accumulate<Dot, M, B>(a, group + first * 64, shape.rows_a_scale(), acc);
    EACH(m, M) { EACH(b, B) { Lanes::store(out + m * kGroup + (first + b) * kBlock, acc[m][b]); }); });
}

/// The same for quantised weights: sums over each group of inputs, then times their scales, added in the order of the inputs.
template <class Dot, int M, int B>
void coded_tile(const Shape& shape, const uint32_t* a, const uint8_t* group, int first, const Sums& sums, float* out) {
    const int64_t rows = shape.rows_a_scale(), scales = shape.scales(), header = shape.header_bytes();
    for (int64_t g = 0; g < scales; g++) {
        typename Dot::Acc acc[M][B];
        clear<Dot, M, B>(acc);
        accumulate<Dot, M, B>(a, group + header + first * 64, rows, acc);
        EACH(b, B) {
            const int block = first + b;
            const auto scale = Lanes::load(reinterpret_cast<const float*>(group) + block * kBlock);
            EACH(m, M) {
                float* place = out + m * kGroup + block * kBlock;
                const auto part = centred<Dot>(shape, acc[m][b], group, block, sums, g * M + m);
                Lanes::store(place, g ? Lanes::fma(part, scale, Lanes::load(place)) : Lanes::mul(part, scale));
            });
        });
        a += rows * Dot::kWords * M;
        group += header + rows * kRowBytes;
    }
    if (!sums.scale) return;
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) {
            float* place = out + m * kGroup + (first + b) * kBlock;
            Lanes::store(place, Lanes::mul(Lanes::load(place), Lanes::set1(sums.scale[m])));
        }
}

}  // namespace
