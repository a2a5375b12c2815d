// Which positions a query sees (ops/reach.py).
#pragma once
#include <algorithm>

#include "bench.h"

namespace {

inline bool sees(const Reach& r, int64_t q, int64_t k) {
    if (k > q) return false;
    if (r.kind == 1) return q - k < r.a || k < r.b;
    if (r.kind == 2) return q / r.a - k / r.a < r.b || (k / r.a) % r.c == 0;
    return true;
}

/// May a query from `first` to `last` see a position from `start` to before `start` + `count`?
inline bool touched(const Reach& r, int64_t first, int64_t last, int64_t start, int64_t count) {
    const int64_t end = std::min(start + count, last + 1);
    if (start >= end) return false;
    if (r.kind == 1) return end > first - r.a + 1 || start < r.b;
    if (r.kind != 2) return true;
    for (int64_t block = start / r.a; block <= (end - 1) / r.a; block++)
        if (block % r.c == 0 || first / r.a - block < r.b) return true;
    return false;
}

/// Does every query from `first` to `last` see all of `start` to before `start` + kStep?
inline bool open(const Reach& r, int64_t first, int64_t last, int64_t start) {
    if (start + kStep - 1 > first) return false;
    return r.kind == 0 || (r.kind == 1 && (last - start < r.a || start + kStep <= r.b));
}

}  // namespace
