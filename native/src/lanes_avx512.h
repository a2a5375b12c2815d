// Sixteen numbers in one register of AVX-512 (F, BW, DQ, VL), with LINESHAFT_VNNI its products of bytes, and with LINESHAFT_DOT_BF16 those of
// bf16 pairs.
#pragma once
#include <immintrin.h>

#include <cstdint>

#ifdef LINESHAFT_SOFT_PRODUCTS
#include "products_soft.h"
#else
#include "products.h"
#endif

namespace {

struct Lanes {
    static constexpr int kMaxRows = 6;
    static constexpr int kBlocks = 4;
#ifdef LINESHAFT_DOT_BF16
    static constexpr bool kDotBf16 = true;
#else
    static constexpr bool kDotBf16 = false;
#endif

    using F = __m512;
    // Not __m512i, which may alias everything: GCC 12 would store such accumulators in each turn of a loop.
    typedef int32_t I __attribute__((vector_size(64)));

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F add(F x, F y) { return _mm512_add_ps(x, y); }
    static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
    static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    static F div(F x, F y) { return _mm512_div_ps(x, y); }
    static F max(F x, F y) { return _mm512_max_ps(x, y); }
    static F min(F x, F y) { return _mm512_min_ps(x, y); }
    static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    /// a * 2^n for whole n in [-126, 127]; infinite for 128.
    static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
    /// 0 where x < limit, else value: also where x is not a number.
    static F where_not_below(F x, float limit, F value) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), value);
    }
    static float sum(F x) {
        __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
    }
    static float largest(F x) { return _mm512_reduce_max_ps(x); }

    static I load_int(const void* p) { return _mm512_loadu_si512(p); }
    static void store_int(void* p, I x) { _mm512_storeu_si512(p, x); }
    static I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
    static I sub_int(I x, I y) { return _mm512_sub_epi32(x, y); }
    static I mul_int(I x, I y) { return _mm512_mullo_epi32(x, y); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static F signed_bytes(const uint8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
    template <int N> static I shift_left(I x) { return _mm512_slli_epi32(x, N); }
    template <int N> static I shift_right(I x) { return _mm512_srli_epi32(x, N); }
    static I and_int(I x, I y) { return _mm512_and_si512(x, y); }
    static I xor_int(I x, I y) { return _mm512_xor_si512(x, y); }
    /// Byte J of each lane as a signed number.
    template <int J> static F signed_byte(I x) { return to_float(_mm512_srai_epi32(shift_left<24 - 8 * J>(x), 24)); }
    /// The four bits from bit N on, minus 8: a permutation reads just the low four bits of its index.
    template <int N> static F nibble(I x) {
        const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(shift_right<N>(x), table);
    }
    /// Whole numbers in [-128, 127] as 16 bytes.
    static void to_bytes(void* p, F x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }
    /// 16 words from each of 16 rows to 16 rows, `stride` words apart, of one word from each.
    static void transpose(const uint32_t* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
        __m512i v[16], t[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(rows[i] + offset);
        for (int i = 0; i < 16; i += 4) {  // 4 x 4 words within each quarter
            const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
            const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
            t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
            t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        for (int i = 0; i < 4; i++) {  // then the quarters of four such rows
            const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
            const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
            _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(a, c, 0x88));
            _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(a, c, 0xdd));
            _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(b, d, 0x88));
            _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(b, d, 0xdd));
        }
    }
    static F as_float(I x) { return _mm512_castsi512_ps(x); }

    static F from_bf16(const uint16_t* p) {
        return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
    }
    static void to_bf16(uint16_t* p, F x) {  // to nearest, ties to even; a NaN stays one
        __m512i bits = _mm512_castps_si512(x);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(up));
    }
    /// 16 words of two bf16 each: one from either row, that of `even` below.
    static void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
        _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    /// To bf16 where the least numbers may become 0, as in products of pairs.
#ifdef LINESHAFT_DOT_BF16
    static void narrow(uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Products::narrow(x)); }
#else
    static void narrow(uint16_t* p, F x) { to_bf16(p, x); }
#endif
    /// acc += two numbers of 16 bits times two others, in each lane.
    static I dot_halves(I acc, I w, I a) { return _mm512_add_epi32(acc, _mm512_madd_epi16(w, a)); }
    /// The even (0) or odd (1) bytes of each lane as two unsigned numbers of 16 bits.
    template <int P> static I every_other(I x) {
        if constexpr (P == 0) return _mm512_and_si512(x, _mm512_set1_epi16(0xff));
        else return _mm512_srli_epi16(x, 8);
    }
#ifdef LINESHAFT_VNNI
    static constexpr bool kHalves = false;
    /// acc += four unsigned bytes of w times four signed bytes of a, in each lane.
    static I dot_bytes(I acc, I w, I a) { return Products::bytes(acc, w, a); }
    static I dot_nibbles(I acc, I w, I a) { return dot_bytes(acc, w, a); }
#else
    static constexpr bool kHalves = true;
    static I dot_bytes(I acc, I, I) { return acc; }
    /// acc += four unsigned numbers below 16 times four signed bytes: sums of two fit into 16 bits, those of bytes would not.
    static I dot_nibbles(I acc, I w, I a) { return dot_halves(acc, _mm512_maddubs_epi16(w, a), _mm512_set1_epi16(1)); }
#endif
#ifdef LINESHAFT_DOT_BF16
    /// Pairs of bf16 of two numbers that bf16 holds.
    static I pair(F low, F high) { return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high)); }
    /// Pairs of bf16 of the four bits from bit N on of each half of a word, minus 8: a permutation reads the low five bits of its
    /// index, so the table stands there twice.
    template <int N> static I nibble_pairs(I x) {
        alignas(64) static constexpr uint16_t table[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(x, N), _mm512_load_si512(table));
    }
    /// Pairs of bf16 of bytes 2 H and 2 H + 1 of each lane, as numbers of e4m3 (fp8_byte in dots.h). Those below 2^-6 are looked up: a
    /// permutation reads the low five bits of its index, of which three are m, so the eight numbers stand there four times.
    template <int H> static I fp8_pairs(I x) {
        alignas(64) static constexpr uint16_t least[32] = {
            0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
            0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
        constexpr int64_t kSecond = 0x0800080008000800;  // from the first to the second half of 16 bytes
        constexpr int64_t kFirst = H ? 0x0780068003800280 : 0x0580048001800080;  // 0x80: a zero byte
        const __m512i upper = _mm512_set4_epi64(kFirst + kSecond, kFirst, kFirst + kSecond, kFirst);
        const __m512i up = _mm512_shuffle_epi8(x, upper);
        const __m512i size = _mm512_srli_epi16(_mm512_and_si512(up, _mm512_set1_epi16(0x7f00)), 4);
        const __m512i normal = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));
        const __m512i found = _mm512_permutexvar_epi16(_mm512_srli_epi16(up, 8), _mm512_load_si512(least));
        const __m512i value = _mm512_mask_mov_epi16(normal, _mm512_testn_epi16_mask(up, _mm512_set1_epi16(0x7800)), found);
        return _mm512_or_si512(value, _mm512_and_si512(up, _mm512_set1_epi16(int16_t(0x8000))));
    }
    /// acc += both products of a pair of bf16, in each lane.
    static F dot_pairs(F acc, I w, I a) { return Products::pairs(acc, w, a); }
#else
    static F dot_pairs(F acc, I, I) { return acc; }
#endif
};

}  // namespace
