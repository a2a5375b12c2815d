// A token for each row of logits, by the rules of ops/sampling.py: what is ruled out is found by counting and weighing the tokens in
// buckets of their distance to the likeliest one, so nothing is sorted but the bucket in which a border lies.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int kBuckets = 4096;
constexpr float kBucketsANat = 64;  // the last bucket holds whatever is further away: less than e^-63 of the likeliest
constexpr int64_t kBlock = 256;     // tokens that are added up together before one of them is looked for

/// Tokens nearer than `distance` are kept, and of those at that distance the ids up to `id`.
struct Border {
    float distance;
    int64_t id;
};

struct Token {
    float distance;
    int64_t id;
    bool operator<(const Token& other) const { return distance != other.distance ? distance < other.distance : id < other.id; }
};

/// What one row is worked on with; grows once.
struct Tray {
    std::vector<float> distances, chances;  // in nats; of the likeliest 1
    std::vector<int64_t> counts;
    std::vector<double> masses;
    std::vector<Token> tokens;  // of one bucket
};

inline int bucket_of(float distance) { return distance < (kBuckets - 1) / kBucketsANat ? int(distance * kBucketsANat) : kBuckets - 1; }

inline float largest_of(const float* logits, int64_t width) {
    auto most = Lanes::set1(-INFINITY);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) most = Lanes::max(Lanes::load(logits + i), most);  // what is not a number is passed over
    float top = Lanes::largest(most);
    for (; i < width; i++) top = logits[i] > top ? logits[i] : top;
    return top;
}

/// Distances and chances; what is not a number is as far as can be.
inline void measure(const float* logits, int64_t width, float top, float temperature, Tray& tray) {
    const auto highest = Lanes::set1(top), cold = Lanes::set1(temperature), zero = Lanes::set1(0.0f), far = Lanes::set1(INFINITY);
    for (int64_t i = 0; i < width; i += 16) {
        const auto distance = Lanes::min(Lanes::div(Lanes::sub(highest, read_some(Activation::f32, logits, i, width - i)), cold), far);
        write_some(Activation::f32, tray.distances.data(), i, width - i, distance);
        write_some(Activation::f32, tray.chances.data(), i, width - i, exponential(Lanes::sub(zero, distance)));
    }
}

inline void fill_buckets(int64_t width, Tray& tray) {
    std::fill_n(tray.counts.begin(), kBuckets, 0);
    std::fill_n(tray.masses.begin(), kBuckets, 0.0);
    for (int64_t i = 0; i < width; i++) {
        const int bucket = bucket_of(tray.distances[i]);
        tray.counts[bucket]++;
        tray.masses[bucket] += tray.chances[i];
    }
}

/// The tokens of a bucket, nearest first.
inline void open_bucket(int bucket, int64_t width, Tray& tray) {
    tray.tokens.clear();
    for (int64_t i = 0; i < width; i++)
        if (bucket_of(tray.distances[i]) == bucket) tray.tokens.push_back({tray.distances[i], i});
    std::sort(tray.tokens.begin(), tray.tokens.end());
}

/// The k likeliest, and those as likely as the last of them. Buckets hold what is kept afterwards.
inline Border most_likely(int64_t k, int64_t width, Tray& tray) {
    int bucket = 0;
    for (; tray.counts[bucket] < k; bucket++) k -= tray.counts[bucket];
    open_bucket(bucket, width, tray);
    const float last = tray.tokens[k - 1].distance;
    tray.masses[bucket] = 0;
    for (const Token& token : tray.tokens)
        if (token.distance <= last) tray.masses[bucket] += tray.chances[token.id];
    std::fill(tray.masses.begin() + bucket + 1, tray.masses.end(), 0.0);
    return {last, width};
}

/// The likeliest that together reach `share` of what `within` keeps, those of lower ids first where they are equal.
inline Border reaching(double share, Border within, int64_t width, Tray& tray) {
    double whole = 0, before = 0;
    for (double mass : tray.masses) whole += mass;
    int bucket = 0;
    while (bucket < kBuckets && before + tray.masses[bucket] < share * whole) before += tray.masses[bucket++];
    if (bucket == kBuckets) return within;
    open_bucket(bucket, width, tray);
    Border border{-1, -1};
    for (const Token& token : tray.tokens) {
        if (token.distance > within.distance || (before > 0 && before >= share * whole)) break;  // the likeliest is always kept
        border = {token.distance, token.id};
        before += tray.chances[token.id];
    }
    return border;
}

/// Which token has the place `luck`, from 0 to below 1, among the chances laid end to end.
inline int64_t at_share(double luck, int64_t width, const Tray& tray) {
    const auto sum_of = [&](int64_t first) {
        double sum = 0;
        for (int64_t i = first; i < std::min(first + kBlock, width); i++) sum += tray.chances[i];
        return sum;
    };
    static thread_local std::vector<double> sums;
    sums.clear();
    double whole = 0;
    for (int64_t first = 0; first < width; first += kBlock) whole += sums.emplace_back(sum_of(first));
    size_t last = sums.size() - 1;  // with a chance in it: rounding must not carry the search beyond
    while (last > 0 && sums[last] <= 0) last--;
    double left = luck * whole;
    size_t block = 0;
    for (; block < last && sums[block] <= left; block++) left -= sums[block];
    int64_t found = 0;
    for (int64_t i = int64_t(block) * kBlock; i < std::min(int64_t(block + 1) * kBlock, width); i++) {
        if (tray.chances[i] <= 0) continue;
        found = i;
        if ((left -= tray.chances[i]) < 0) break;
    }
    return found;
}

inline int64_t chosen_of(const float* logits, int64_t width, const Choice& choice, Tray& tray) {
    const float top = largest_of(logits, width);
    if (top == -INFINITY) return -1;
    if (choice.temperature == 0 || !std::isfinite(top)) {
        return std::find(logits, logits + width, top) - logits;
    }
    measure(logits, width, top, float(std::clamp(choice.temperature, kColdest, kHottest)), tray);
    Border border{INFINITY, width};
    const bool some = choice.top_k > 0 && choice.top_k < double(width);
    if (some || choice.top_p < 1) fill_buckets(width, tray);
    if (some) border = most_likely(int64_t(choice.top_k), width, tray);
    if (choice.top_p < 1) border = reaching(choice.top_p, border, width, tray);
    for (int64_t i = 0; i < width; i++) {
        const float distance = tray.distances[i], chance = tray.chances[i];
        const bool kept = (distance < border.distance || (distance == border.distance && i <= border.id)) && chance >= choice.min_p;
        tray.chances[i] = kept ? chance : 0.0f;
    }
    return at_share(choice.luck, width, tray);
}

inline void sample(const Sample& s, int part, int parts) {
    static thread_local Tray tray;
    if (int64_t(tray.distances.size()) < s.width) tray.distances.resize(s.width), tray.chances.resize(s.width);
    tray.counts.resize(kBuckets), tray.masses.resize(kBuckets);
    const auto own = team::share(s.rows, part, parts);
    for (int64_t r = own.first; r < own.last; r++) s.tokens[r] = chosen_of(s.logits + r * s.stride, s.width, s.choices[r], tray);
}

}  // namespace
