// Products of several small numbers in one instruction, which not every processor with AVX-512 has: of bytes with LINESHAFT_VNNI, of pairs of
// bf16 with LINESHAFT_DOT_BF16.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Products {
#ifdef LINESHAFT_VNNI
    /// acc += four unsigned bytes of w times four signed bytes of a, in each lane.
    [[gnu::always_inline]] static __m512i bytes(__m512i acc, __m512i w, __m512i a) { return _mm512_dpbusd_epi32(acc, w, a); }
#endif
#ifdef LINESHAFT_DOT_BF16
    /// acc += both products of a pair of bf16, in each lane.
    [[gnu::always_inline]] static __m512 pairs(__m512 acc, __m512i w, __m512i a) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a); }
    /// To bf16.
    [[gnu::always_inline]] static __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#endif
};

}  // namespace
