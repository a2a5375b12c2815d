// The products of products.h out of AVX-512's first instructions, for tests on processors without VNNI and bf16: the same results, bit for
// bit, after Intel's manual (volume 2, VPDPBUSD, VDPBF16PS and VCVTNEPS2BF16).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Products {
    /// Even and odd bytes apart as numbers of 16 bits; two products of those fit into 32 bits, and sums wrap around.
    static __m512i bytes(__m512i acc, __m512i w, __m512i a) {
        const __m512i low = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0xff)), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
        const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
        return _mm512_add_epi32(acc, _mm512_add_epi32(low, high));
    }
    /// The odd numbers' product first, then the even ones', each added by an FMA; denormals count as zero and become zero.
    static __m512 pairs(__m512 acc, __m512i w, __m512i a) {
        const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
        acc = multiply(acc, _mm512_and_si512(w, upper), _mm512_and_si512(a, upper));
        return multiply(acc, _mm512_slli_epi32(w, 16), _mm512_slli_epi32(a, 16));
    }
    /// To nearest, ties to even; a denormal becomes a zero of its sign, and what is not a number stays none.
    static __m256i narrow(__m512 x) {
        const __m512i bits = _mm512_castps_si512(no_denormal(x));
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet), 16));
    }

  private:
    static __m512 no_denormal(__m512 x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __mmask16 least = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
        return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, least, bits, _mm512_set1_epi32(int(0x80000000u))));
    }
    static __m512 multiply(__m512 acc, __m512i w, __m512i a) {
        return no_denormal(_mm512_fmadd_ps(no_denormal(_mm512_castsi512_ps(w)), no_denormal(_mm512_castsi512_ps(a)), no_denormal(acc)));
    }
};

}  // namespace
