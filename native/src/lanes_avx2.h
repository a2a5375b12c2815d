// Sixteen numbers as two registers of AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Lanes {
    static constexpr int kMaxRows = 4;
    static constexpr int kBlocks = 1;
    static constexpr bool kDotBf16 = false;
    static constexpr bool kHalves = true;

    struct F { __m256 a, b; };
    struct I { __m256i a, b; };

    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static F round(F x) {
        return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static __m256 power(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
    /// a * 2^n for whole n in [-126, 127]; infinite for 128.
    static F scale2(F x, F n) { return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))}; }
    /// 0 where x < limit, else value: also where x is not a number.
    static F where_not_below(F x, float limit, F value) {
        const __m256 l = _mm256_set1_ps(limit);
        return {_mm256_and_ps(value.a, _mm256_cmp_ps(x.a, l, _CMP_NLT_UQ)), _mm256_and_ps(value.b, _mm256_cmp_ps(x.b, l, _CMP_NLT_UQ))};
    }
    static float sum(F x) {
        __m256 h = _mm256_add_ps(x.a, x.b);
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
    }
    static float largest(F x) {
        __m256 h = _mm256_max_ps(x.a, x.b);
        __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_max_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
    }

    static void store_int(void* p, I x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
        _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
    }
    static I load_int(const void* p) {
        return {_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_loadu_si256(static_cast<const __m256i*>(p) + 1)};
    }
    static I set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static I sub_int(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
    static I mul_int(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static I bytes(const uint8_t* p) {
        __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
    }
    static F signed_bytes(const uint8_t* p) {
        __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return to_float({_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))});
    }
    template <int N> static I shift_left(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
    template <int N> static I shift_right(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
    static I and_int(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
    static I xor_int(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
    /// Byte J of each lane as a signed number.
    template <int J> static F signed_byte(I x) {
        const I up = shift_left<24 - 8 * J>(x);
        return to_float({_mm256_srai_epi32(up.a, 24), _mm256_srai_epi32(up.b, 24)});
    }
    /// The four bits from bit N on, minus 8.
    template <int N> static F nibble(I x) { return to_float(sub_int(and_int(shift_right<N>(x), set1_int(15)), set1_int(8))); }
    /// Whole numbers in [-128, 127] as 16 bytes.
    static void to_bytes(void* p, F x) {
        const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // 0-3 8-11 4-7 12-15
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
    }
    /// 16 words from each of 16 rows to 16 rows, `stride` words apart, of one word from each.
    static void transpose(const uint32_t* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
        for (int r = 0; r < 16; r += 4)
            for (int c = 0; c < 16; c += 4) {
                __m128 v[4];
                for (int i = 0; i < 4; i++) v[i] = _mm_loadu_ps(reinterpret_cast<const float*>(rows[r + i] + offset + c));
                _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
                for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float*>(out + (c + i) * stride + r), v[i]);
            }
    }
    static F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

    static F from_bf16(const uint16_t* p) {
        __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)), 16))};
    }
    static __m256i rounded(__m256 x) {  // to nearest, ties to even; a NaN stays one
        __m256i bits = _mm256_castps_si256(x);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    }
    static void to_bf16(uint16_t* p, F x) {
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(x.a), rounded(x.b)), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
    }
    /// The even (0) or odd (1) bytes of each lane as two unsigned numbers of 16 bits.
    template <int P> static I every_other(I x) {
        if constexpr (P == 0) return and_int(x, {_mm256_set1_epi16(0xff), _mm256_set1_epi16(0xff)});
        else return {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)};
    }
    /// acc += two numbers of 16 bits times two others, in each lane.
    static I dot_halves(I acc, I w, I a) {
        return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, a.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, a.b))};
    }
    /// acc += four unsigned numbers below 16 times four signed bytes: sums of two fit into 16 bits, those of bytes would not.
    static I dot_nibbles(I acc, I w, I a) {
        const I one = {_mm256_set1_epi16(1), _mm256_set1_epi16(1)};
        return dot_halves(acc, {_mm256_maddubs_epi16(w.a, a.a), _mm256_maddubs_epi16(w.b, a.b)}, one);
    }
    /// 16 words of two bf16 each: one from either row, that of `even` below.
    static void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
        for (int i = 0; i < 16; i++) out[i] = uint32_t(even[i]) | uint32_t(odd[i]) << 16;
    }
    static void narrow(uint16_t* p, F x) { to_bf16(p, x); }
    static I dot_bytes(I acc, I, I) { return acc; }
    static F dot_pairs(F acc, I, I) { return acc; }
};

}  // namespace
