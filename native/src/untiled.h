// Products of an instruction set without tiles: all of them on vector registers.
#pragma once
#include "vectors.h"

namespace {

using on_vectors::layout_of;
using on_vectors::pack;

using on_vectors::kMostTokens;

/// What a thread holds from product to product: nothing here, see tiled.h.
struct Tiling {};

constexpr int64_t kTogether = 1;
inline int64_t together(const Linear&, const Layout&) { return kTogether; }

/// `count`: 1, see `together`.
inline void multiply(const Linear& l, const Layout& s, int64_t tile, int64_t group, int64_t, float* numbers, Tiling&) {
    on_vectors::multiply(l, s, tile, group, numbers);
}

}  // namespace
