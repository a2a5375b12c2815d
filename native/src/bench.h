// What attention works on at a time, and where: an item of queries and heads, 64 positions in each step.
#pragma once
#include <algorithm>

#include "numbers.h"
#include "packed.h"

namespace {

constexpr int kStep = 64;        // positions worked on together: one group of the packed layout
#ifdef LINESHAFT_TILES
constexpr int kMostRows = 256;   // rows that share what was gathered for a step: tiles are so fast that gathering would take as long
#else
constexpr int kMostRows = 96;    // whole tiles of kMaxRows
#endif
constexpr int kMostKeyWidth = 1024, kMostValueWidth = 1024;

/// What a thread works in. Reused from call to call.
struct Bench {
    alignas(64) uint32_t keys[kMostKeyWidth * kStep];            // transposed: [words][64 positions]
    alignas(64) uint32_t values[kMostValueWidth * kStep];        // [width / 64][64 positions, or 32 pairs of them][64]
    alignas(64) uint32_t found_keys[kStep * kMostKeyWidth];      // of coded pages: [64 positions][words], decoded
    alignas(64) uint32_t found_values[kStep * kMostValueWidth];
    alignas(64) uint32_t queries[kMostRows * kMostKeyWidth];     // tiles of packed words
    alignas(64) float out[kMostRows * kMostValueWidth];          // [width / 64][rows][64]
    alignas(64) float scores[kMostRows * kStep];
    alignas(64) uint32_t chances[kMostRows * kStep];             // [rows][64 positions, or 32 pairs]
    alignas(64) float sums[kMostRows * 16];
    alignas(64) float largest[kMostRows], tops[kMostRows], shrink[kMostRows];

    /// A row's sum in channel v.
    float* out_at(int64_t row, int64_t v) { return out + v / kGroup * kGroup * kMostRows + row * kGroup + v % kGroup; }
};

inline Bench& bench_of_thread() {
    static thread_local Bench bench;
    return bench;
}

/// An entry that nobody sees.
inline const void* nothing() {
    alignas(64) static const uint32_t zeros[std::max(kMostKeyWidth, kMostValueWidth)] = {};
    return zeros;
}

struct Item {
    const Chunk* chunk;
    int64_t kv_head, first_head, heads;  // heads: of those that share the key head; or all of several key heads, of one query
    int64_t first, count;                // queries of the chunk

    int64_t rows() const { return heads * count; }
    int64_t position(int64_t row) const { return chunk->first + first + row / heads; }
    int64_t token(int64_t row) const { return chunk->row + first + row / heads; }
    int64_t head(const Attention& a, int64_t row) const { return kv_head * (a.heads / a.kv_heads) + first_head + row % heads; }
};

/// How an item is worked on: its queries are put where its steps look for them, and then a step of 64 positions after the other.
struct Way {
    void (*gather_queries)(const Attention&, const Item&, Bench&);
    void (*take_step)(const Attention&, const Item&, int64_t start, Bench&);
};

/// Are chances and values multiplied as pairs of bf16? Chances are rounded to it then, their sums are not.
inline bool in_pairs(const Attention& a) { return Lanes::kDotBf16 && a.activation == Activation::bf16; }

inline const void* query_of(const Attention& a, const Item& item, int64_t row) {
    return row_of(a.activation, a.q, item.token(row) * a.q_stride + item.head(a, row) * a.key_width);
}

inline int words_of(const Attention& a) { return int(a.activation == Activation::f32 ? a.key_width : a.key_width / 2); }

/// The keys of 64 positions as the weights that they lie like.
inline Shape keys_of(const Attention& a) { return {a.activation == Activation::f32 ? Weight::f32 : Weight::bf16, a.key_width, kGroup, 0, false}; }

}  // namespace
