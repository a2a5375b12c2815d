// bf16 products of few tokens on vector registers, in the order of the tiles of AMX and so with their bits: they read a stream of weights
// faster than tiles do, which take 16 rows of a block before the next block.
//
// Of each tile the products of even and of odd inputs are two chains of FMA from zero, then even and odd are added, then that to the sum
// so far; denormals are zero (Intel's manual, TDPBF16PS).
#pragma once
#include <immintrin.h>

#include "vectors.h"

namespace {

constexpr int64_t kFewTokens = 3;  // two chains of each by four blocks are 24 registers
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

/// numbers[M][64] of one group of outputs. a: packed words, those of one row of all tokens together; `turn`: rows of a tile.
template <int M>
void few_tokens(const uint32_t* a, const uint8_t* w, int64_t rows, int64_t turn, float* numbers) {
    constexpr int B = kGroup / kBlock;
    const auto upper = Lanes::set1_int(int32_t(0xffff0000));
    std::fill_n(numbers, M * kGroup, 0.0f);
    for (int64_t first = 0; first < rows; first += turn) {
        Lanes::F even[M][B], odd[M][B];
        EACH(m, M) { EACH(b, B) { even[m][b] = odd[m][b] = Lanes::set1(0.0f); }); });
        for (int64_t row = 0; row < turn; row++, a += M, w += kRowBytes) {
            Lanes::F low[M], high[M];
            EACH(m, M) {
                const auto pair = Lanes::set1_int(int32_t(word_at(a + m)));
                low[m] = Lanes::as_float(Lanes::shift_left<16>(pair)), high[m] = Lanes::as_float(Lanes::and_int(pair, upper));
            });
            EACH(b, B) {
                __builtin_prefetch(w + kNear + b * 64, 0, 3);
                const auto pair = Lanes::load_int(w + b * 64);
                const auto at_even = Lanes::as_float(Lanes::shift_left<16>(pair)), at_odd = Lanes::as_float(Lanes::and_int(pair, upper));
                EACH(m, M) {
                    even[m][b] = Lanes::fma(low[m], at_even, even[m][b]);
                    odd[m][b] = Lanes::fma(high[m], at_odd, odd[m][b]);
                });
            });
        }
        EACH(m, M) {
            EACH(b, B) {
                float* place = numbers + m * kGroup + b * kBlock;
                Lanes::store(place, Lanes::add(Lanes::load(place), Lanes::add(even[m][b], odd[m][b])));
            });
        });
    }
}

/// The same for `tokens` of them.
inline void few(int64_t tokens, const uint32_t* a, const uint8_t* w, int64_t rows, int64_t turn, float* numbers) {
    const Flushed flushed;
    (tokens == 1 ? few_tokens<1> : tokens == 2 ? few_tokens<2> : few_tokens<3>)(a, w, rows, turn, numbers);
}

}  // namespace
