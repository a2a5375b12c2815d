// The innermost loops: some tokens times some blocks of 16 outputs, over inputs that follow each other in packed rows.
#pragma once
#include <type_traits>
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

/// Blocks of outputs worked on together, so that accumulators of so many tokens fit into registers.
constexpr int blocks_for(int tokens) { return Lanes::kBlocks == 4 ? 4 : Lanes::kMaxRows < 4 ? 1 : tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

#define EACH(index, count) times<count>([&](auto index) __attribute__((always_inline))

/// Which memory is asked for while rows are worked on: four lines for each of them.
struct Ahead {
    const uint8_t* from;
    int64_t step;  // bytes from row to row
};

/// One part of a row, and its words of activations.
template <class Dot, int P>
struct Part {
    static typename Dot::W weights(const uint8_t* p) { return Dot::template weights<P>(p); }
    static typename Dot::A spread(const uint32_t* a, int step) { return Dot::template spread<P>(a, step); }
};

/// acc[m][b] += activations of token m times block b, of one row or a part of it.
template <class Dot, int M, int B, class Side>
inline __attribute__((always_inline)) void meet(Side, const uint32_t* a, const uint8_t* w, typename Dot::Acc (&acc)[M][B]) {
    typename Dot::W weights[B];
    EACH(b, B) { weights[b] = Side::weights(w + b * 64); });
    EACH(m, M) {
        const typename Dot::A spread = Side::spread(a + m, M);
        EACH(b, B) { acc[m][b] = Dot::dot(acc[m][b], weights[b], spread); });
    });
}

/// acc[m][b] += activations of token m times block b, over `rows` packed rows from `w` on.
/// a: packed words, those of one row of all `M` tokens together: [rows][words a row][M].
template <class Dot, int M, int B>
inline __attribute__((always_inline)) void accumulate(const uint32_t* a, const uint8_t* w, int64_t rows, Ahead ahead, typename Dot::Acc (&acc)[M][B]) {
    for (int64_t row = 0; row < rows; row++) {
        EACH(b, B) { __builtin_prefetch(ahead.from + b * 64, 0, 3); });
        if constexpr (requires { Dot::kParts; }) {
            EACH(part, Dot::kParts) { meet<Dot, M, B>(Part<Dot, decltype(part)::value>{}, a, w, acc); });
        } else {
            meet<Dot, M, B>(Dot{}, a, w, acc);
        }
        a += M * Dot::kWords;
        w += kRowBytes;
        ahead.from += ahead.step;
    }
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

/// Neighbouring packed rows of one group of outputs, all within one scale.
struct Piece {
    const Shape& shape;
    const uint8_t* weights;
    int64_t rows;
    const uint8_t* header;  // scales and zero points before the rows; null: dense
    int64_t scale;          // which of a token's scales that is
    bool begin, end;        // of what shares it
    Ahead ahead;
};

/// A tile of tokens, and where their numbers are: [tokens][64] each.
struct Tokens {
    const uint32_t* packed;  // those of the piece's first row
    Sums sums;
    void* parts;             // sums of a scale whose end is not reached: float32 or int32
    float* out;
};

template <class Acc>
inline Acc load_part(const void* p) {
    if constexpr (std::is_same_v<Acc, Lanes::F>) return Lanes::load(static_cast<const float*>(p));
    else return Lanes::load_int(p);
}

inline void store_part(void* p, Lanes::F x) { Lanes::store(static_cast<float*>(p), x); }
inline void store_part(void* p, Lanes::I x) { Lanes::store_int(p, x); }

/// What a scale's sums are for the tokens' numbers.
template <class Dot, int M, int B>
inline __attribute__((always_inline)) void finish(const Piece& piece, const Tokens& tokens, int first, typename Dot::Acc (&acc)[M][B]) {
    const bool last = tokens.sums.scale && piece.scale == piece.shape.scales() - 1;
    EACH(b, B) {
        const int block = first + b;
        const auto scale = Lanes::load(reinterpret_cast<const float*>(piece.header) + block * kBlock);
        EACH(m, M) {
            float* place = tokens.out + m * kGroup + block * kBlock;
            const auto part = centred<Dot>(piece.shape, acc[m][b], piece.header, block, tokens.sums, piece.scale * M + m);
            auto value = piece.scale ? Lanes::fma(part, scale, Lanes::load(place)) : Lanes::mul(part, scale);
            if (last) value = Lanes::mul(value, Lanes::set1(tokens.sums.scale[m]));
            Lanes::store(place, value);
        });
    });
}

/// A piece times M tokens. Dense numbers are complete with the last piece; coded ones are, at the end of each scale, centred,
/// scaled and added in the order of the scales, and at the end of the last one multiplied by the token's own scale.
template <class Dot, bool Coded, int M>
void take(const Piece& piece, const Tokens& tokens) {
    constexpr int B = blocks_for(M);
    for (int first = 0; first < kGroup / kBlock; first += B) {
        typename Dot::Acc acc[M][B];
        const auto part = [&](int m, int b) { return static_cast<float*>(tokens.parts) + m * kGroup + (first + b) * kBlock; };
        if (piece.begin) EACH(m, M) { EACH(b, B) { acc[m][b] = Dot::zero(); }); });
        else EACH(m, M) { EACH(b, B) { acc[m][b] = load_part<typename Dot::Acc>(part(m, b)); }); });
        accumulate<Dot, M, B>(tokens.packed, piece.weights + first * 64, piece.rows, piece.ahead, acc);
        if (!piece.end) {
            EACH(m, M) { EACH(b, B) { store_part(part(m, b), acc[m][b]); }); });
        } else if constexpr (!Coded) {
            EACH(m, M) { EACH(b, B) { Lanes::store(tokens.out + m * kGroup + (first + b) * kBlock, acc[m][b]); }); });
        } else {
            finish<Dot, M, B>(piece, tokens, first, acc);
        }
    }
}

}  // namespace
