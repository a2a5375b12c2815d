// Sixteen numbers at a time in plain C++: right on every processor, fast on none.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "words.h"

namespace {

struct Lanes {
    static constexpr int kMaxRows = 2;   // rows x blocks of a product kept in registers
    static constexpr int kBlocks = 1;    // blocks of 16 outputs at a time
    static constexpr bool kDotBf16 = false;
    static constexpr bool kHalves = false;

    struct F { float v[16]; };
    struct I { int32_t v[16]; };

    template <class Fn> static F each(Fn fn) { F r; for (int i = 0; i < 16; i++) r.v[i] = fn(i); return r; }
    template <class Fn> static I each_int(Fn fn) { I r; for (int i = 0; i < 16; i++) r.v[i] = fn(i); return r; }

    static F load(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
    static void store(float* p, F a) { std::memcpy(p, a.v, 64); }
    static F set1(float x) { return each([&](int) { return x; }); }
    static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static F min(F a, F b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static F round(F a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
    /// a * 2^n for whole n in [-126, 127]; infinite for 128.
    static F scale2(F a, F n) {
        return each([&](int i) { int32_t bits = (int32_t(n.v[i]) + 127) << 23; float p; std::memcpy(&p, &bits, 4); return a.v[i] * p; });
    }
    /// 0 where x < limit, else value: also where x is not a number.
    static F where_not_below(F x, float limit, F value) { return each([&](int i) { return x.v[i] < limit ? 0.0f : value.v[i]; }); }
    static float sum(F a) {  // in the order of the vector forms: halves, quarters, pairs
        for (int step = 8; step; step /= 2) for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
        return a.v[0];
    }
    static float largest(F a) { float m = a.v[0]; for (int i = 1; i < 16; i++) m = a.v[i] > m ? a.v[i] : m; return m; }

    static void store_int(void* p, I a) { std::memcpy(p, a.v, 64); }
    static I load_int(const void* p) { I r; std::memcpy(r.v, p, 64); return r; }
    static I set1_int(int32_t x) { return each_int([&](int) { return x; }); }
    static I sub_int(I a, I b) { return each_int([&](int i) { return a.v[i] - b.v[i]; }); }
    static I mul_int(I a, I b) { return each_int([&](int i) { return a.v[i] * b.v[i]; }); }
    static F to_float(I a) { return each([&](int i) { return float(a.v[i]); }); }
    static I bytes(const uint8_t* p) { return each_int([&](int i) { return int32_t(p[i]); }); }
    static F signed_bytes(const uint8_t* p) { return each([&](int i) { return float(int8_t(p[i])); }); }
    template <int N> static I shift_left(I a) { return each_int([&](int i) { return int32_t(uint32_t(a.v[i]) << N); }); }
    template <int N> static I shift_right(I a) { return each_int([&](int i) { return int32_t(uint32_t(a.v[i]) >> N); }); }
    static I and_int(I a, I b) { return each_int([&](int i) { return a.v[i] & b.v[i]; }); }
    static I xor_int(I a, I b) { return each_int([&](int i) { return a.v[i] ^ b.v[i]; }); }
    /// Byte J of each lane as a signed number.
    template <int J> static F signed_byte(I a) { return each([&](int i) { return float(int8_t(uint32_t(a.v[i]) >> (8 * J))); }); }
    /// The four bits from bit N on, minus 8.
    template <int N> static F nibble(I a) { return each([&](int i) { return float(int32_t((uint32_t(a.v[i]) >> N) & 15) - 8); }); }
    /// Whole numbers in [-128, 127] as 16 bytes.
    static void to_bytes(void* p, F a) { for (int i = 0; i < 16; i++) static_cast<int8_t*>(p)[i] = int8_t(a.v[i]); }
    /// 16 words from each of 16 rows to 16 rows, `stride` words apart, of one word from each.
    static void transpose(const uint32_t* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
        for (int r = 0; r < 16; r++) for (int c = 0; c < 16; c++) out[c * stride + r] = word_at(rows[r] + offset + c);
    }
    static F as_float(I a) { F r; std::memcpy(r.v, a.v, 64); return r; }

    static F from_bf16(const uint16_t* p) { return as_float(each_int([&](int i) { return int32_t(uint32_t(p[i]) << 16); })); }
    static void to_bf16(uint16_t* p, F a) {
        for (int i = 0; i < 16; i++) {
            uint32_t bits; std::memcpy(&bits, &a.v[i], 4);
            p[i] = a.v[i] != a.v[i] ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    }
    /// 16 words of two bf16 each: one from either row, that of `even` below.
    static void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
        for (int i = 0; i < 16; i++) out[i] = uint32_t(even[i]) | uint32_t(odd[i]) << 16;
    }
    static void narrow(uint16_t* p, F a) { to_bf16(p, a); }
    /// acc += four unsigned bytes of w times four signed bytes of a, in each lane.
    static I dot_bytes(I acc, I w, I a) {
        return each_int([&](int i) {
            int32_t s = acc.v[i];
            for (int j = 0; j < 4; j++) s += int32_t(uint8_t(w.v[i] >> (8 * j))) * int32_t(int8_t(a.v[i] >> (8 * j)));
            return s;
        });
    }
    static I dot_nibbles(I acc, I w, I a) { return dot_bytes(acc, w, a); }
    static I dot_halves(I acc, I, I) { return acc; }
    template <int> static I every_other(I x) { return x; }
    static F dot_pairs(F acc, I, I) { return acc; }
};

}  // namespace
