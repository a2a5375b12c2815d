// Which experts a token gets: affinities, the best groups, the best experts of those. Of equals the first wins.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr float kOut = -INFINITY;  // of what can't be chosen, or has been

/// The place of the greatest of some numbers.
inline int64_t greatest(const float* numbers, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (numbers[i] > numbers[best] || (numbers[best] == kOut && numbers[i] != numbers[i])) best = i;
    return best;
}

/// Softmax or sigmoid of `width` numbers, a multiple of 16; those behind the real ones are minus infinity.
inline void affinities(const Route& r, const float* logits, int64_t width, float* out) {
    auto most = Lanes::load(logits), sum = Lanes::set1(0.0f);
    for (int64_t i = 16; i < width; i += 16) most = Lanes::max(most, Lanes::load(logits + i));
    const auto top = Lanes::set1(Lanes::largest(most));
    for (int64_t i = 0; i < width; i += 16) {
        const auto value = Lanes::load(logits + i);
        const auto affinity = r.sigmoid ? logistic(value) : exponential(Lanes::sub(value, top));
        Lanes::store(out + i, affinity);
        sum = Lanes::add(sum, affinity);
    }
    if (r.sigmoid) return;
    const auto whole = Lanes::set1(Lanes::sum(sum));
    for (int64_t i = 0; i < width; i += 16) Lanes::store(out + i, Lanes::div(Lanes::load(out + i), whole));
}

/// Rules out experts outside the best groups. A group is as good as its best two experts (sigmoid), or its best one (softmax).
inline void within_groups(const Route& r, float* choice, float* worth) {
    const int64_t size = r.experts / r.groups;
    for (int64_t g = 0; g < r.groups; g++) {
        const float* own = choice + g * size;
        const int64_t best = greatest(own, size);
        worth[g] = own[best];
        if (!r.sigmoid) continue;
        float second = kOut;
        for (int64_t i = 0; i < size; i++)
            if (i != best) second = std::max(second, own[i]);
        worth[g] += second;
    }
    for (int64_t kept = 0; kept < r.best_groups; kept++) worth[greatest(worth, r.groups)] = kOut;
    for (int64_t g = 0; g < r.groups; g++)
        if (worth[g] != kOut) std::fill_n(choice + g * size, size, kOut);
}

inline void route(const Route& r, int part, int parts) {
    static thread_local std::vector<float> bench;  // grows once
    const int64_t width = (r.experts + 15) / 16 * 16;
    if (int64_t(bench.size()) < 3 * width + r.groups) bench.resize(size_t(3 * width + r.groups));
    float *logits = bench.data(), *affinity = logits + width, *choice = affinity + width, *worth = choice + width;
    std::fill_n(logits, width, kOut);
    const auto own = team::share(r.tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++) {
        std::memcpy(logits, r.logits + t * r.experts, size_t(r.experts) * 4);
        affinities(r, logits, width, affinity);
        for (int64_t e = 0; e < r.experts; e++) choice[e] = affinity[e] + (r.bias ? r.bias[e] : 0.0f);
        if (r.groups > 1) within_groups(r, choice, worth);
        float sum = 0, *weights = r.weights + t * r.top;
        for (int64_t k = 0; k < r.top; k++) {
            const int64_t best = greatest(choice, r.experts);
            choice[best] = kOut;
            r.chosen[t * r.top + k] = best;
            weights[k] = affinity[best];
            sum += affinity[best];
        }
        for (int64_t k = 0; k < r.top; k++) weights[k] = (r.normalise ? weights[k] / (sum + 1e-20f) : weights[k]) * r.scaling;
    }
}

}  // namespace
