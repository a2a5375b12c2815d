// Products of few tokens in bf16 on vector registers, in the order of the tiles of AMX and so with their bits: they read a stream of weights
// faster than tiles do, which take 16 rows of a block before the next block.
//
// Of each tile the products of even and of odd inputs are two chains of FMA from zero, then even and odd are added, then that to the sum
// so far; denormals are zero (Intel's manual, TDPBF16PS).
#pragma once
#include <immintrin.h>

#include "vectors.h"

namespace {

constexpr int64_t kFewTokens = 3;  // two chains of each by four blocks are 24 registers
constexpr int64_t kFewOfCodes = 2;  // which are unpacked on the way
constexpr int kNear = 1024;         // bytes ahead that are asked for: 2048 was 0 to 5 % slower, 4096 15 %

/// Denormals are zero, as in tiles, while this lives.
class Flushed {
  public:
    Flushed() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kBoth); }
    ~Flushed() { _mm_setcsr(before_); }
    Flushed(const Flushed&) = delete;
    Flushed& operator=(const Flushed&) = delete;

  private:
    static constexpr unsigned kBoth = 0x8040;  // results, and what is read
    unsigned before_;
};

/// bf16 weights: a row is a row of pairs.
struct DotPairs : DotCodedPairs<1> {
    static W weights(const uint8_t* p) { return {{Lanes::load_int(p)}}; }
};

using Halves = DotBf16::Wide;

inline __attribute__((always_inline)) Halves halves(Lanes::I pairs) { return DotBf16::as<Halves>(pairs); }

/// The end of a tile: sums[M][64] += even + odd, of B blocks.
template <int M, int B>
inline __attribute__((always_inline)) void add_chains(const Lanes::F (&even)[M][B], const Lanes::F (&odd)[M][B], float* sums) {
    EACH(m, M) {
        EACH(b, B) {
            float* place = sums + m * kGroup + b * kBlock;
            Lanes::store(place, Lanes::add(Lanes::load(place), Lanes::add(even[m][b], odd[m][b])));
        });
    });
}

/// The even and the odd inputs of a row of weights, as float32.
template <class Dot>
struct Apart {
    Lanes::F even[Dot::kWords], odd[Dot::kWords];
};

template <class Dot>
inline __attribute__((always_inline)) Apart<Dot> apart(const uint8_t* p) {
    const auto made = Dot::weights(p);
    Apart<Dot> found;
    EACH(j, Dot::kWords) {
        const Halves of = halves(made.pairs[j]);
        found.even[j] = of.low, found.odd[j] = of.high;
    });
    return found;
}

/// Bytes need not be made pairs first.
template <>
inline __attribute__((always_inline)) Apart<DotW8Pairs> apart<DotW8Pairs>(const uint8_t* p) {
    return {{DotW8::weights<0>(p), DotW8::weights<2>(p)}, {DotW8::weights<1>(p), DotW8::weights<3>(p)}};
}

/// parts[M][64] += of `rows` packed rows, tile after tile of `turn` rows. a: packed words, those of one row of all tokens together.
template <class Dot, int M>
void add_few(const uint32_t* a, const uint8_t* w, int64_t rows, int64_t turn, float* parts) {
    constexpr int B = kGroup / kBlock, kWords = Dot::kWords;
    for (int64_t first = 0; first < rows; first += turn) {
        Lanes::F even[M][B], odd[M][B];
        EACH(m, M) { EACH(b, B) { even[m][b] = odd[m][b] = Lanes::set1(0.0f); }); });
        for (int64_t row = 0; row < turn; row++, a += M * kWords, w += kRowBytes) {
            Halves of[M][kWords];
            EACH(m, M) { EACH(j, kWords) { of[m][j] = halves(Lanes::set1_int(int32_t(word_at(a + j * M + m)))); }); });
            EACH(b, B) {
                __builtin_prefetch(w + kNear + b * 64, 0, 3);
                const Apart<Dot> weights = apart<Dot>(w + b * 64);
                EACH(j, kWords) {
                    EACH(m, M) {
                        even[m][b] = Lanes::fma(of[m][j].low, weights.even[j], even[m][b]);
                        odd[m][b] = Lanes::fma(of[m][j].high, weights.odd[j], odd[m][b]);
                    });
                });
            });
        }
        add_chains<M, B>(even, odd, parts);
    }
}

using AddFew = void (*)(const uint32_t* a, const uint8_t* w, int64_t rows, int64_t turn, float* parts);

template <class Dot>
AddFew few_for(int64_t tokens) {
    return tokens == 1 ? add_few<Dot, 1> : tokens == 2 ? add_few<Dot, 2> : add_few<Dot, 3>;
}

}  // namespace
