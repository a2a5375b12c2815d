// Entries of 64 positions out of the pages: keys transposed, values in rows or in rows of pairs.
#pragma once
#include "coded.h"
#include "reach.h"
#include "words.h"

namespace {

/// 16 channels, from `v` on, of two positions: neighbours become pairs.
inline void pair_values(const void* even, const void* odd, int64_t v, int64_t width, uint32_t* out) {
    const auto *a = static_cast<const uint16_t*>(even) + v, *b = static_cast<const uint16_t*>(odd) + v;
    if (width - v >= 16) return Lanes::interleave(a, b, out);
    std::fill_n(out, 16, 0u);
    for (int64_t i = 0; i < width - v; i++) out[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
}

inline void gather_values(const Attention& a, const void* const* values, Bench& bench) {
    const bool pairs = in_pairs(a);
    const int rows = pairs ? kStep / 2 : kStep;
    for (int64_t v = 0; v < a.value_width; v += 16) {
        uint32_t* out = bench.values + v / kGroup * rows * kGroup + v % kGroup;
        for (int j = 0; j < rows; j++, out += kGroup) {
            if (pairs) pair_values(values[2 * j], values[2 * j + 1], v, a.value_width, out);
            else Lanes::store(reinterpret_cast<float*>(out), read_some(a.activation, values[j], v, a.value_width - v));
        }
    }
}

inline void gather_keys(const Attention& a, const uint32_t* const* keys, Bench& bench) {
    const int words = words_of(a);
    for (int j = 0; j < kStep; j += 16) {
        int w = 0;
        for (; w + 16 <= words; w += 16) Lanes::transpose(keys + j, w, bench.keys + w * kStep + j, kStep);
        for (; w < words; w++)
            for (int i = 0; i < 16; i++) bench.keys[w * kStep + j + i] = word_at(keys[j + i] + w);
    }
}

/// A head's entry in a slot of pages: where it lies or, of coded pages, where it was decoded to, which is place j of `room`.
inline const void* entry_at(const Attention& a, const void* pages, int64_t offset, uint32_t* room, int j) {
    if (!a.coded) return row_of(a.activation, pages, offset);
    const int64_t vectors = (a.key_width + 15) / 16 * 16;
    void* to = const_cast<void*>(row_of(a.activation, room, j * vectors));
    decode(a.activation, static_cast<const uint8_t*>(pages) + offset, a.key_width, to);
    return to;
}

/// Where the pages hold an entry of the item's head: offsets of its key and its value.
struct Where {
    int64_t key, value;
};

inline Where where(const Attention& a, const Item& item, int64_t position) {
    const int64_t slot = a.tables[item.chunk->table + position / a.page_tokens] * a.page_tokens + position % a.page_tokens;
    return {slot * a.key_stride + item.kv_head * a.key_head_stride, slot * a.value_stride + item.kv_head * a.value_head_stride};
}

/// The entries of 64 positions from `start` on: keys transposed, values in rows. What nobody of the item sees is zero.
inline void gather_step(const Attention& a, const Item& item, int64_t start, Bench& bench) {
    const int64_t first = item.position(0), last = item.position(item.rows() - 1);
    const bool all = open(a.reach, first, last, start);
    const uint32_t* keys[kStep];
    const void* values[kStep];
    for (int j = 0; j < kStep; j++) {
        if (!all && !touched(a.reach, first, last, start + j, 1)) {
            keys[j] = static_cast<const uint32_t*>(nothing());
            values[j] = nothing();
            continue;
        }
        const Where at = where(a, item, start + j);
        const void* found = entry_at(a, a.keys, at.key, bench.found_keys, j);
        keys[j] = static_cast<const uint32_t*>(found);
        values[j] = a.coded && a.keys == a.values ? found : entry_at(a, a.values, at.value, bench.found_values, j);
    }
    gather_keys(a, keys, bench);
    gather_values(a, values, bench);
}

}  // namespace
