// The product of tokens and packed weights: activations packed into tiles once, then each thread takes its groups of outputs.
#pragma once
#include <algorithm>

#include LINESHAFT_PRODUCTS
#include "rows.h"

namespace {

/// Some numbers of one token from output `o` of `l` on, with its bias, in the kind of the result.
inline Lanes::F biased(const Linear& l, int64_t o, int64_t count, const float* numbers) {
    const auto value = Lanes::load(numbers);
    return l.bias ? Lanes::add(value, read_some(Activation::f32, l.bias, o, count)) : value;
}

/// A tile's numbers of one group of outputs, with the bias and what they are added to, rounded where separate ops would round, to where they belong.
inline void put(const Linear& l, int64_t first, int64_t count, int64_t group, const float* numbers) {
    const auto kind = l.wide ? Activation::f32 : l.activation;
    const int64_t start = group * kGroup, stop = std::min(start + kGroup, l.shape.outputs);
    for (int64_t m = 0; m < count; m++, numbers += kGroup)
        for (int64_t o = start; o < stop; o += kBlock) {
            auto value = biased(l, o, stop - o, numbers + o - start);
            if (l.added) value = Lanes::add(rounded(kind, value), read_some(kind, l.added, (first + m) * l.added_stride + o, stop - o));
            write_some(kind, l.out, (first + m) * l.out_stride + o, stop - o, value);
        }
}

/// SiLU(gate) * up of a tile's numbers of one group, rounded likewise, to where the up product's belong.
inline void put_swiglu(const Linear& gate, const Linear& up, int64_t first, int64_t count, int64_t group, const float* gates, const float* ups) {
    const auto kind = up.activation;
    const int64_t start = group * kGroup, stop = std::min(start + kGroup, up.shape.outputs);
    for (int64_t m = 0; m < count; m++, gates += kGroup, ups += kGroup)
        for (int64_t o = start; o < stop; o += kBlock) {
            const auto opened = rounded(kind, silu(rounded(kind, biased(gate, o, stop - o, gates + o - start))));
            const auto value = rounded(kind, biased(up, o, stop - o, ups + o - start));
            write_some(kind, up.out, (first + m) * up.out_stride + o, stop - o, Lanes::mul(opened, value));
        }
}

/// The products of some groups of outputs. Of two linears the second one's result is SiLU(first) * second.
inline void groups_of(const Linear* linears, int count, const Layout& s, team::Range groups) {
    constexpr int64_t kNumbers = kMostTokens * kGroup;  // of a group
    alignas(64) static thread_local float numbers[2][kTogether * kNumbers];
    Tiling tiling;
    const Linear& l = linears[count - 1];
    const int64_t most = together(l, s);
    for (int64_t group = groups.first; group < groups.last; group += most) {
        const int64_t now = std::min(most, groups.last - group);
        for (int64_t tile = 0; tile < s.tiles(l.tokens); tile++) {
            const int64_t first = tile * s.tile, tokens = std::min(s.tile, l.tokens - first);
            for (int i = 0; i < count; i++) multiply(linears[i], s, tile, group, now, numbers[i], tiling);
            for (int64_t i = 0; i < now; i++) {
                const float *of = numbers[0] + i * kNumbers, *second = numbers[1] + i * kNumbers;
                if (count == 1) put(l, first, tokens, group + i, of);
                else put_swiglu(linears[0], l, first, tokens, group + i, of, second);
            }
        }
    }
}

/// Products of the same activations by weights alike but for their outputs: as if they were one.
inline void linears(const Linear* all, int64_t count, void* scratch, int part, int parts) {
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < count; i++) total += all[i].shape.groups();
    const auto own = team::share(total, part, parts);
    const Layout s = layout_of(all[0], scratch);
    for (int64_t i = 0; i < count; before += all[i++].shape.groups()) {
        const team::Range groups{std::max<int64_t>(0, own.first - before), std::min(all[i].shape.groups(), own.last - before)};
        if (groups.first < groups.last) groups_of(all + i, 1, s, groups);
    }
}

inline void swiglu_of(const Linear* gate_and_up, void* scratch, int part, int parts) {
    groups_of(gate_and_up, 2, layout_of(*gate_and_up, scratch), team::share(gate_and_up->shape.groups(), part, parts));
}

}  // namespace
