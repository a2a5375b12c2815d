// Experts: tokens sorted by expert, so that a weight is read once for all of its tokens; then each token's results, weighted, are
// added in the order of its choice. Products are those of linear.h, so a token's numbers do not depend on who shares its experts.
#pragma once
#include <algorithm>

#include "desk.h"
#include "linear.h"

namespace {

constexpr int64_t kReading = 4;  // what reading a group of a weight costs beside multiplying one token by it
constexpr int kPieces = 4;       // in which the packing of an expert's tokens is shared

inline void sort(const Experts& e, const Desk& d) {
    const int64_t pairs = e.tokens * e.top;
    int32_t used = 0;
    std::fill_n(d.starts, e.experts + 1, 0);
    for (int64_t pair = 0; pair < pairs; pair++) d.starts[e.chosen[pair] + 1]++;
    for (int64_t expert = 0; expert < e.experts; expert++) {
        if (d.starts[expert + 1]) d.used[used++] = int32_t(expert);
        d.next[expert] = d.starts[expert];
        d.starts[expert + 1] += d.starts[expert];
    }
    *d.used_count = used;
    for (int64_t pair = 0; pair < pairs; pair++) {
        d.places[pair] = d.next[e.chosen[pair]]++;
        d.rows[d.places[pair]] = int32_t(pair / e.top);
    }
}

enum class Which : int { gate, up, down };

struct Product {
    Linear linear;
    Layout layout;
    void* scratch;
};

inline Product product_of(const Experts& e, const Desk& d, Which which, int64_t expert) {
    const bool down = which == Which::down;
    const int64_t first = d.starts[expert], width = e.down.inputs, hidden = e.down.outputs;
    Linear l{down ? e.down : e.in, reinterpret_cast<const uint8_t*>(e.addresses[int(which) * e.experts + expert]), nullptr,
             down ? e.down_whole : e.in_whole, e.activation, e.x, e.x_stride, const_cast<void*>(row_of(e.activation, d.results, first * hidden)),
             hidden, d.starts[expert + 1] - first, d.rows + first};
    if (down) {
        l.x = row_of(e.activation, d.middle, first * width);
        l.x_stride = width;
        l.rows = nullptr;
    }
    void* scratch = (down ? d.packed_middle : d.packed) + first * packed_words(l.shape, l.whole);
    return {l, layout_of(l, scratch), scratch};
}

/// Calls fn(expert, groups of outputs) with this part's share of the groups of all experts, weighed by their tokens.
template <class Fn>
void each_share(const Desk& d, int64_t groups, int part, int parts, Fn fn) {
    int64_t total = 0, before = 0;
    for (int i = 0; i < *d.used_count; i++) total += groups * (kReading + d.starts[d.used[i] + 1] - d.starts[d.used[i]]);
    const auto own = team::share(total, part, parts);
    for (int i = 0; i < *d.used_count && before < own.last; i++) {
        const int64_t expert = d.used[i], cost = kReading + d.starts[expert + 1] - d.starts[expert];
        const auto group_at = [&](int64_t place) { return std::clamp<int64_t>((place - before + cost - 1) / cost, 0, groups); };
        const team::Range range{own.first <= before ? 0 : group_at(own.first), group_at(own.last)};
        if (range.first < range.last) fn(expert, range);
        before += groups * cost;
    }
}

inline void pack_experts(const Experts& e, const Desk& d, Which which, int part, int parts) {
    const auto own = team::share(int64_t(*d.used_count) * kPieces, part, parts);
    for (int64_t piece = own.first; piece < own.last; piece++) {
        const Product p = product_of(e, d, which, d.used[piece / kPieces]);
        pack(p.linear, p.scratch, int(piece % kPieces), kPieces);
    }
}

inline void swiglu(const Experts& e, const Desk& d, int part, int parts) {
    const int64_t width = e.in.outputs;
    each_share(d, e.in.groups(), part, parts, [&](int64_t expert, team::Range groups) {
        const Product gate = product_of(e, d, Which::gate, expert);
        Linear both[] = {gate.linear, product_of(e, d, Which::up, expert).linear};
        both[1].out = const_cast<void*>(row_of(e.activation, d.middle, d.starts[expert] * width));
        both[1].out_stride = width;
        groups_of(both, 2, gate.layout, groups);
    });
}

inline void combine(const Experts& e, const Desk& d, int part, int parts) {
    const int64_t width = e.down.outputs;
    const auto own = team::share(e.tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++) {
        void* out = const_cast<void*>(row_of(e.activation, e.out, t * width));
        for (int64_t i = 0; i < width; i += 16) {
            auto sum = Lanes::set1(0.0f);
            for (int64_t pair = t * e.top; pair < (t + 1) * e.top; pair++) {
                const auto weight = rounded(e.activation, Lanes::set1(e.weights[pair]));
                const auto value = read_some(e.activation, row_of(e.activation, d.results, d.places[pair] * width), i, width - i);
                sum = Lanes::add(sum, rounded(e.activation, Lanes::mul(value, weight)));
            }
            write_some(e.activation, out, i, width - i, sum);
        }
    }
}

inline void experts(const Experts& e, Stage stage, void* scratch, int part, int parts) {
    const Desk d = desk_of(e, scratch);
    switch (stage) {
        case Stage::sort: return part == 0 ? sort(e, d) : void();
        case Stage::pack: return pack_experts(e, d, Which::gate, part, parts);
        case Stage::swiglu: return swiglu(e, d, part, parts);
        case Stage::pack_down: return pack_experts(e, d, Which::down, part, parts);
        case Stage::down:
            return each_share(d, e.down.groups(), part, parts, [&](int64_t expert, team::Range groups) {
                const Product p = product_of(e, d, Which::down, expert);
                groups_of(&p.linear, 1, p.layout, groups);
            });
        case Stage::combine: return combine(e, d, part, parts);
    }
}

}  // namespace
