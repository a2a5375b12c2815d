// Weights into rows of the packed layout (packed.h): 16 outputs by 16 words at a time, turned round in registers.
#pragma once
#include <algorithm>

#include LINESHAFT_LANES
#include "packed.h"
#include "words.h"

namespace {

constexpr int64_t kReadAhead = 512;  // bytes of each output: 64 outputs are more streams than a processor follows by itself

/// rows[row][output] = word `row` of each output, whose first word stands at from + output * stride.
inline void lay_words(const void* from, int64_t stride, int64_t outputs, int64_t rows, uint8_t* group) {
    const auto word = [&](int64_t o, int64_t row) { return reinterpret_cast<const uint32_t*>(static_cast<const char*>(from) + o * stride) + row; };
    auto* out = reinterpret_cast<uint32_t*>(group);
    const int64_t whole_rows = rows / 16 * 16, whole_outputs = outputs / 16 * 16;
    for (int64_t row = 0; row < whole_rows; row += 16)
        for (int64_t o = 0; o < whole_outputs; o += 16) {
            const uint32_t* block[16];
            for (int i = 0; i < 16; i++) {
                block[i] = word(o + i, row);
                __builtin_prefetch(reinterpret_cast<const char*>(block[i]) + kReadAhead, 0, 0);
            }
            Lanes::transpose(block, 0, out + row * kGroup + o, kGroup);
        }
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t row = o < whole_outputs ? whole_rows : 0; row < rows; row++) out[row * kGroup + o] = word_at(word(o, row));
}

/// The same for codes of 4 bits, one a byte: eight neighbouring ones become a word, the first four in the low halves of its bytes.
inline void lay_halves(const uint8_t* from, int64_t stride, int64_t outputs, int64_t rows, uint8_t* group) {
    auto* out = reinterpret_cast<uint32_t*>(group);
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t row = 0; row < rows; row++) {
            const auto* codes = reinterpret_cast<const uint32_t*>(from + o * stride + row * 8);
            out[row * kGroup + o] = word_at(codes) | (word_at(codes + 1) << 4);
        }
}

}  // namespace
