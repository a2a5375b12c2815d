// Where things lie in the scratch of one call of the experts.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace {

/// Pairs of a token and one of its experts stand in places, sorted by expert.
struct Desk {
    int32_t* starts;         // [experts + 1]: the first place of each expert
    int32_t* next;           // [experts]
    int32_t* used;           // experts that have tokens
    int32_t* used_count;
    int32_t* rows;           // [pairs]: the token at each place
    int32_t* places;         // [pairs]: the place of each pair
    uint32_t* packed;        // of x, by place; then `results`
    void* results;           // [pairs, hidden]
    void* middle;            // [pairs, width of an expert]
    uint32_t* packed_middle;
    int64_t bytes;           // of all
};

/// Words that a token's packed activations take (layout_for in activations.h): whole cache lines, so that what belongs to an
/// expert or a head begins at one, as rows of tiles should.
inline int64_t packed_words(const Shape& shape, bool whole) { return (shape.words(whole) + shape.scales() + 1 + 15) / 16 * 16; }

inline Desk desk_of(const Experts& e, void* scratch) {
    const int64_t pairs = e.tokens * e.top, item = e.activation == Activation::f32 ? 4 : 2;
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        char* place = static_cast<char*>(scratch) + used;
        used += (bytes + 63) / 64 * 64;
        return place;
    };
    const auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(4 * count)); };
    Desk d;
    d.starts = ints(e.experts + 1);
    d.next = ints(e.experts);
    d.used = ints(e.experts);
    d.used_count = ints(1);
    d.rows = ints(pairs);
    d.places = ints(pairs);
    d.results = take(pairs * std::max(4 * packed_words(e.in, e.in_whole), item * e.down.outputs));
    d.packed = static_cast<uint32_t*>(d.results);
    d.middle = take(pairs * item * e.down.inputs);
    d.packed_middle = reinterpret_cast<uint32_t*>(take(pairs * 4 * packed_words(e.down, e.down_whole)));
    d.bytes = used;
    return d;
}

}  // namespace
