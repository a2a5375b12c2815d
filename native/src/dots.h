// How one 64-byte row of packed weights (16 outputs, 1 to 8 inputs each) meets the activations of one token.
//
// A `Dot` adds into one accumulator an output, in the order of the inputs and by the same instructions however many
// tokens are worked on together: that is what makes a token's numbers the same bits in any company. Where a row is met in
// several parts (kParts), each of them meets all tokens before the next one does: fewer registers hold what was unpacked.
#pragma once
#include <type_traits>

#include LINESHAFT_LANES
#include "words.h"

namespace {

/// float32 weights and activations: one input a row.
struct DotF32 {
    using Acc = Lanes::F;
    using W = Lanes::F;
    using A = Lanes::F;
    static constexpr int kWords = 1;   // 32-bit words of activations a row
    static constexpr bool kWhole = false;  // sums of whole numbers
    static constexpr int kInputs = 1;  // inputs a row
    static Acc zero() { return Lanes::set1(0.0f); }
    static W weights(const uint8_t* p) { return Lanes::load(reinterpret_cast<const float*>(p)); }
    static A spread(const uint32_t* a, int) { return Lanes::as_float(Lanes::set1_int(int32_t(word_at(a)))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::fma(a, w, acc); }
};

/// bf16 weights and activations: two inputs a row, products and sums in float32.
struct DotBf16 {
    using Acc = Lanes::F;
    struct Wide { Lanes::F low, high; };
    using W = std::conditional_t<Lanes::kDotBf16, Lanes::I, Wide>;
    using A = W;
    static constexpr int kWords = 1;
    static constexpr bool kWhole = false;
    static constexpr int kInputs = 2;
    static Acc zero() { return Lanes::set1(0.0f); }
    static W weights(const uint8_t* p) { return as<W>(Lanes::load_int(p)); }
    static A spread(const uint32_t* a, int) { return as<A>(Lanes::set1_int(int32_t(word_at(a)))); }
    template <class T> static Acc dot(Acc acc, const T& w, const T& a) {
        if constexpr (Lanes::kDotBf16) return Lanes::dot_pairs(acc, w, a);
        else return Lanes::fma(a.high, w.high, Lanes::fma(a.low, w.low, acc));
    }
    template <class T> static T as(Lanes::I pairs) {
        if constexpr (std::is_same_v<T, Lanes::I>) return pairs;
        else return {Lanes::as_float(Lanes::template shift_left<16>(pairs)),
                     Lanes::as_float(Lanes::and_int(pairs, Lanes::set1_int(int32_t(0xffff0000))))};
    }
};

/// The same where products are made in float32: one neighbour after the other, activations as float32.
struct DotBf16Apart {
    using Acc = Lanes::F;
    using W = Lanes::F;
    using A = Lanes::F;
    static constexpr int kWords = 2, kParts = 2;
    static constexpr bool kWhole = false;
    static Acc zero() { return Lanes::set1(0.0f); }
    template <int P> static W weights(const uint8_t* p) {
        const auto pairs = Lanes::load_int(p);
        if constexpr (P == 0) return Lanes::as_float(Lanes::template shift_left<16>(pairs));
        else return Lanes::as_float(Lanes::and_int(pairs, Lanes::set1_int(int32_t(0xffff0000))));
    }
    template <int P> static A spread(const uint32_t* a, int step) { return Lanes::as_float(Lanes::set1_int(int32_t(word_at(a + P * step)))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::fma(a, w, acc); }
};

/// Unsigned 8-bit weights, signed 8-bit activations: four inputs a row, exact in int32.
struct DotI8 {
    using Acc = Lanes::I;
    using W = Lanes::I;
    using A = Lanes::I;
    static constexpr int kWords = 1;
    static constexpr bool kWhole = true;  // sums of whole numbers
    static Acc zero() { return Lanes::set1_int(0); }
    static W weights(const uint8_t* p) { return Lanes::load_int(p); }
    static A spread(const uint32_t* a, int) { return Lanes::set1_int(int32_t(word_at(a))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::dot_bytes(acc, w, a); }
};

/// The same where there are no products of four bytes: even and odd inputs as pairs of 16 bits.
struct DotI8Apart : DotI8 {
    static constexpr int kWords = 2, kParts = 2;
    template <int P> static W weights(const uint8_t* p) { return Lanes::template every_other<P>(Lanes::load_int(p)); }
    template <int P> static A spread(const uint32_t* a, int step) { return Lanes::set1_int(int32_t(word_at(a + P * step))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::dot_halves(acc, w, a); }
};

/// Unsigned 4-bit weights, signed 8-bit activations: eight inputs a row, the low half of each byte before the high one.
struct DotI4 : DotI8 {
    static constexpr int kWords = 2, kParts = 2;
    template <int P> static W weights(const uint8_t* p) {
        return Lanes::and_int(Lanes::template shift_right<4 * P>(Lanes::load_int(p)), Lanes::set1_int(0x0f0f0f0f));
    }
    template <int P> static A spread(const uint32_t* a, int step) { return Lanes::set1_int(int32_t(word_at(a + P * step))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::dot_nibbles(acc, w, a); }
};

/// N numbers of float32 in each word of weights, one after the other.
template <int N>
struct DotCodes {
    using Acc = Lanes::F;
    using W = Lanes::F;
    using A = Lanes::F;
    static constexpr int kWords = N, kParts = N;
    static constexpr bool kWhole = false;
    static Acc zero() { return Lanes::set1(0.0f); }
    template <int P> static A spread(const uint32_t* a, int step) { return Lanes::as_float(Lanes::set1_int(int32_t(word_at(a + P * step)))); }
    static Acc dot(Acc acc, const W& w, const A& a) { return Lanes::fma(a, w, acc); }
};

/// 8-bit weights, taken as signed, and float32 activations: four inputs a row.
struct DotW8 : DotCodes<4> {
    template <int P> static W weights(const uint8_t* p) {
        return Lanes::template signed_byte<P>(Lanes::xor_int(Lanes::load_int(p), Lanes::set1_int(int32_t(0x80808080))));  // code - 128
    }
};

/// Byte J of each lane as a number of e4m3: exponent and mantissa where a float32 has them, and 120 more in the exponent. Where e4m3's is 0
/// (below 2^-6) this is (1 + m / 8) / 128 and should be m / 512, which is what adding it less 2^-6 makes of it. All exact; and never
/// a denormal number on the way, which takes processors of Intel a hundred cycles. 0x7f and 0xff, which are none, never get here (ops/packing.py).
template <int J>
inline Lanes::F fp8_byte(Lanes::I x) {
    const Lanes::I up = Lanes::template shift_left<24 - 8 * J>(x);
    const Lanes::I size = Lanes::template shift_right<4>(Lanes::and_int(up, Lanes::set1_int(0x7f000000)));
    const Lanes::I sign = Lanes::and_int(up, Lanes::set1_int(int32_t(0x80000000)));
    const auto value = Lanes::as_float(Lanes::sub_int(size, Lanes::set1_int(-(120 << 23))));
    const auto whole = Lanes::add(value, Lanes::min(Lanes::sub(value, Lanes::set1(0x1p-6f)), Lanes::set1(0.0f)));
    return Lanes::mul(whole, Lanes::as_float(Lanes::xor_int(sign, Lanes::set1_int(0x3f800000))));  // 1 or -1
}

/// FP8 weights and float32 activations: four inputs a row.
struct DotF8 : DotCodes<4> {
    template <int P> static W weights(const uint8_t* p) { return fp8_byte<P>(Lanes::load_int(p)); }
};

/// 4-bit weights, taken as code - 8, and float32 activations: eight inputs a row, those in the low halves of the bytes first.
struct DotW4 : DotCodes<8> {
    template <int P> static W weights(const uint8_t* p) { return Lanes::template nibble<8 * (P % 4) + 4 * (P / 4)>(Lanes::load_int(p)); }
};

#ifdef LINESHAFT_DOT_BF16
/// Coded weights that become N pairs of bf16 a row, and bf16 activations.
template <int N>
struct DotCodedPairs {
    using Acc = Lanes::F;
    struct Pairs { Lanes::I pairs[N]; };
    using W = Pairs;
    using A = Pairs;
    static constexpr int kWords = N;
    static constexpr bool kWhole = false;
    static Acc zero() { return Lanes::set1(0.0f); }
    static A spread(const uint32_t* a, int step) {
        A r;
        for (int j = 0; j < N; j++) r.pairs[j] = Lanes::set1_int(int32_t(word_at(a + j * step)));
        return r;
    }
    static Acc dot(Acc acc, const W& w, const A& a) {
        for (int j = 0; j < N; j++) acc = Lanes::dot_pairs(acc, w.pairs[j], a.pairs[j]);
        return acc;
    }
};

/// 8-bit weights, taken as signed: four inputs a row.
struct DotW8Pairs : DotCodedPairs<2> {
    static W weights(const uint8_t* p) {
        const auto all = Lanes::xor_int(Lanes::load_int(p), Lanes::set1_int(int32_t(0x80808080)));  // code - 128
        return {{Lanes::pair(Lanes::template signed_byte<0>(all), Lanes::template signed_byte<1>(all)),
                 Lanes::pair(Lanes::template signed_byte<2>(all), Lanes::template signed_byte<3>(all))}};
    }
};

/// FP8 weights: four inputs a row. They have fewer bits than bf16 and no larger exponents.
struct DotF8Pairs : DotCodedPairs<2> {
    static W weights(const uint8_t* p) {
        const auto all = Lanes::load_int(p);
        return {{Lanes::template fp8_pairs<0>(all), Lanes::template fp8_pairs<1>(all)}};
    }
};

/// 4-bit weights, taken as code - 8: eight inputs a row, as pairs of inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7.
struct DotW4Pairs : DotCodedPairs<4> {
    static W weights(const uint8_t* p) {
        const auto all = Lanes::load_int(p);
        return {{Lanes::template nibble_pairs<0>(all), Lanes::template nibble_pairs<8>(all), Lanes::template nibble_pairs<4>(all),
                 Lanes::template nibble_pairs<12>(all)}};
    }
};
#endif

}  // namespace
