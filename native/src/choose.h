// Which earlier positions a token attends to, where an indexer chooses (DeepSeek-V3.2, section 2.1): small heads score every position that
// the token sees, and the best ones' places in the pages are listed. Attention then reads that list as if its pages held one token each.
//
// Scores are made as those of attention: 64 positions at a time, each number the same whatever else is worked on.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "attention.h"
#include "team.h"

namespace {

/// The sum over an item's heads, added to `scores`, of weight times ReLU(query times key * scale), of 64 positions.
inline void add_up(const Choosing& c, const Item& item, const Bench& bench, bool first, float* scores) {
    const float* weights = c.weights + item.token(0) * c.heads.heads + item.first_head;
    const auto scale = Lanes::set1(c.heads.scale), zero = Lanes::set1(0.0f);
    for (int j = 0; j < kStep; j += 16) {
        auto sum = first ? zero : Lanes::load(scores + j);
        for (int64_t row = 0; row < item.heads; row++) {
            const auto near = Lanes::max(Lanes::mul(Lanes::load(bench.scores + row * kStep + j), scale), zero);
            sum = Lanes::fma(Lanes::set1(weights[row]), near, sum);
        }
        Lanes::store(scores + j, sum);
    }
}

/// Scores of one token at the positions of the `part`-th of `parts` shares of its context, in whole steps. What it does not see has any.
inline void score_positions(const Choosing& c, const Chunk& chunk, int64_t query, int part, int parts, float* scores, Bench& bench) {
    const Attention& a = c.heads;
    const Way way = way_of_scores(a);
    const int64_t position = chunk.first + query;
    const auto steps = team::share(position / kStep + 1, part, parts);
    for (int64_t head = 0; head < a.heads; head += kMostRows) {
        const Item item{&chunk, 0, head, std::min<int64_t>(kMostRows, a.heads - head), query, 1};
        way.gather_queries(a, item, bench);
        for (int64_t start = steps.first * kStep; start < steps.last * kStep; start += kStep) {
            if (!touched(a.reach, position, position, start, kStep)) continue;
            way.take_step(a, item, start, bench);
            add_up(c, item, bench, head == 0, scores + start);
        }
    }
}

/// Lists what the `query`-th token of a chunk chooses, and the list as a chunk of its own. No scores: it chooses all that it sees.
inline void list(const Choosing& c, const Chunk& chunk, int64_t query, const float* scores) {
    static thread_local std::vector<float> seen;
    const Attention& a = c.heads;
    const int64_t position = chunk.first + query, token = chunk.row + query;
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    const auto score = [=](int64_t at) { return scores && scores[at] > kLowest ? scores[at] : kLowest; };  // also of what is not a number
    seen.clear();
    for (int64_t at = 0; at <= position; at++)
        if (sees(a.reach, position, at)) seen.push_back(score(at));
    float least = kLowest;
    int64_t equals = int64_t(seen.size());  // how many of those with the least score have room
    if (equals > c.top) {
        std::nth_element(seen.begin(), seen.begin() + (c.top - 1), seen.end(), std::greater<float>());
        least = seen[size_t(c.top - 1)];
        equals = c.top - std::count_if(seen.begin(), seen.begin() + c.top, [=](float one) { return one > least; });
    }
    int32_t *const first = c.slots + token * c.top, *next = first;
    for (int64_t at = 0; at <= position; at++) {
        if (!sees(a.reach, position, at) || score(at) < least || (score(at) == least && equals-- <= 0)) continue;
        *next++ = int32_t(a.tables[chunk.table + at / a.page_tokens] * a.page_tokens + at % a.page_tokens);
    }
    std::fill(next, first + c.top, -1);
    c.chosen[token] = {token, next - first - 1, 1, token * c.top};
}

inline bool scored(const Choosing& c, int64_t position) { return position >= c.top; }  // else it sees at most as many as it may choose
inline bool together(const Choosing& c, int64_t position) { return c.tokens <= c.room_tokens && position < c.longest; }

/// Of few tokens, whose positions all threads share.
inline void score_together(const Choosing& c, int part, int parts) {
    for (int64_t n = 0; n < c.heads.chunk_count; n++) {
        const Chunk& chunk = c.heads.chunks[n];
        for (int64_t query = 0; query < chunk.count; query++)
            if (scored(c, chunk.first + query) && together(c, chunk.first + query))
                score_positions(c, chunk, query, part, parts, c.room + (chunk.row + query) * c.longest, bench_of_thread());
    }
}

/// Tokens in turns, each with its positions unless those were scored together.
inline void choose(const Choosing& c, int part, int parts) {
    static thread_local std::vector<float> own;
    int64_t number = 0;
    for (int64_t n = 0; n < c.heads.chunk_count; n++)
        for (int64_t query = 0; query < c.heads.chunks[n].count; query++) {
            if (number++ % parts != part) continue;
            const Chunk& chunk = c.heads.chunks[n];
            const int64_t position = chunk.first + query;
            const float* scores = nullptr;
            if (scored(c, position) && together(c, position)) scores = c.room + (chunk.row + query) * c.longest;
            else if (scored(c, position)) {
                own.resize(std::max(own.size(), size_t(position / kStep + 1) * kStep));
                score_positions(c, chunk, query, 0, 1, own.data(), bench_of_thread());
                scores = own.data();
            }
            list(c, chunk, query, scores);
        }
}

}  // namespace
