// What is done to each token by itself: norms, rotations, SwiGLU, sums. Rounded where the PyTorch reference rounds.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "numbers.h"
#include "team.h"

namespace {

/// e^x to about 1e-7, by Cody and Waite's reduction and a polynomial of degree 6 (Taylor); below -87 it is exactly 0, from 88.4 on
/// infinite. A NaN stays one: max and min give their second argument where one of the two is none.
inline Lanes::F exponential(Lanes::F whole) {
    auto x = Lanes::min(Lanes::set1(89.0f), Lanes::max(Lanes::set1(-87.0f), whole));
    const auto n = Lanes::round(Lanes::mul(x, Lanes::set1(1.44269504088896341f)));
    auto r = Lanes::fma(n, Lanes::set1(-0.693359375f), x);
    r = Lanes::fma(n, Lanes::set1(2.12194440e-4f), r);
    auto p = Lanes::set1(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = Lanes::fma(p, r, Lanes::set1(c));
    return Lanes::where_not_below(whole, -87.0f, Lanes::scale2(p, Lanes::min(n, Lanes::set1(128.0f))));
}

inline void norm(const Norm& n, int part, int parts) {
    const auto own = team::share(n.tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++) {
        const void* x = row_of(n.activation, n.x, t * n.x_stride);
        void* out = const_cast<void*>(row_of(n.activation, n.out, t * n.out_stride));
        auto squares = Lanes::set1(0.0f);
        for (int64_t i = 0; i < n.width; i += 16) {
            const auto value = read_some(n.activation, x, i, n.width - i);
            squares = Lanes::fma(value, value, squares);
        }
        const auto factor = Lanes::set1(1.0f / std::sqrt(Lanes::sum(squares) / float(n.width) + n.eps));
        for (int64_t i = 0; i < n.width; i += 16) {
            const int64_t count = n.width - i;
            const auto scaled = rounded(n.activation, Lanes::mul(read_some(n.activation, x, i, count), factor));
            write_some(n.activation, out, i, count, Lanes::mul(scaled, read_some(n.weight_kind, n.weight, i, count)));
        }
    }
}

/// Mean and variance in two passes, as the variance of numbers far from zero needs.
inline void centred(const Centred& c, int part, int parts) {
    const Norm& n = c.norm;
    const auto own = team::share(n.tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++) {
        const void* x = row_of(n.activation, n.x, t * n.x_stride);
        void* out = const_cast<void*>(row_of(n.activation, n.out, t * n.out_stride));
        auto sum = Lanes::set1(0.0f);
        for (int64_t i = 0; i < n.width; i += 16) sum = Lanes::add(sum, read_some(n.activation, x, i, n.width - i));
        const auto mean = Lanes::set1(Lanes::sum(sum) / float(n.width));
        float squares = 0;
        for (int64_t i = 0; i < n.width; i += 16) {
            const auto value = Lanes::sub(read_some(n.activation, x, i, n.width - i), mean);
            alignas(64) float each[16];
            Lanes::store(each, Lanes::mul(value, value));
            for (int64_t j = 0; j < std::min<int64_t>(16, n.width - i); j++) squares += each[j];
        }
        const auto factor = Lanes::set1(1.0f / std::sqrt(squares / float(n.width) + n.eps));
        for (int64_t i = 0; i < n.width; i += 16) {
            const int64_t count = n.width - i;
            const auto scaled = Lanes::mul(Lanes::sub(read_some(n.activation, x, i, count), mean), factor);
            write_some(n.activation, out, i, count, Lanes::fma(scaled, read_some(n.weight_kind, n.weight, i, count), read_some(c.bias_kind, c.bias, i, count)));
        }
    }
}

inline void rope(const Rope& r, int part, int parts) {
    const int64_t half = r.width / 2;
    const auto own = team::share(r.tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++)
        for (int64_t h = 0; h < r.heads; h++) {
            const void* x = row_of(r.activation, r.x, t * r.x_stride + h * r.head_stride);
            void* out = const_cast<void*>(row_of(r.activation, r.out, (t * r.heads + h) * r.width));
            const float *cos = r.cos + t * half, *sin = r.sin + t * half;
            if (!r.interleaved && half % 16 == 0) {
                for (int64_t i = 0; i < half; i += 16) {
                    const auto a = read16(r.activation, x, i), b = read16(r.activation, x, half + i);
                    const auto c = Lanes::load(cos + i), s = Lanes::load(sin + i);
                    write16(r.activation, out, i, Lanes::sub(Lanes::mul(a, c), Lanes::mul(b, s)));
                    write16(r.activation, out, half + i, Lanes::add(Lanes::mul(b, c), Lanes::mul(a, s)));
                }
                continue;
            }
            for (int64_t i = 0; i < half; i++) {
                const int64_t first = r.interleaved ? 2 * i : i, second = r.interleaved ? 2 * i + 1 : half + i;
                const float a = at(r.activation, x, first), b = at(r.activation, x, second);
                write_some(r.activation, out, first, 1, Lanes::set1(a * cos[i] - b * sin[i]));
                write_some(r.activation, out, second, 1, Lanes::set1(b * cos[i] + a * sin[i]));
            }
        }
}

/// Every thread an equal number of whole vectors.
inline team::Range vectors(int64_t count, int part, int parts) {
    const auto own = team::share((count + 15) / 16, part, parts);
    return {own.first * 16, std::min(own.last * 16, count)};
}

inline Lanes::F silu(Lanes::F x) {
    const auto one = Lanes::set1(1.0f);
    return Lanes::div(x, Lanes::add(one, exponential(Lanes::sub(Lanes::set1(0.0f), x))));
}

inline void silu_mul(Activation kind, const void* gate, const void* up, void* out, int64_t count, int part, int parts) {
    const auto own = vectors(count, part, parts);
    for (int64_t i = own.first; i < own.last; i += 16) {
        const auto value = rounded(kind, silu(read_some(kind, gate, i, own.last - i)));
        write_some(kind, out, i, own.last - i, Lanes::mul(value, read_some(kind, up, i, own.last - i)));
    }
}

inline void add(Activation kind, const void* a, const void* b, void* out, int64_t count, int part, int parts) {
    const auto own = vectors(count, part, parts);
    for (int64_t i = own.first; i < own.last; i += 16)
        write_some(kind, out, i, own.last - i, Lanes::add(read_some(kind, a, i, own.last - i), read_some(kind, b, i, own.last - i)));
}

inline Lanes::F logistic(Lanes::F x) {
    const auto one = Lanes::set1(1.0f);
    return Lanes::div(one, Lanes::add(one, exponential(Lanes::sub(Lanes::set1(0.0f), x))));
}

inline void sigmoid(Activation kind, const void* x, void* out, int64_t count, int part, int parts) {
    const auto own = vectors(count, part, parts);
    for (int64_t i = own.first; i < own.last; i += 16) write_some(kind, out, i, own.last - i, logistic(read_some(kind, x, i, own.last - i)));
}

/// Every token times a number of its own.
inline void scaled(Activation kind, const void* x, const void* factors, void* out, int64_t tokens, int64_t width, int part, int parts) {
    const auto own = team::share(tokens, part, parts);
    for (int64_t t = own.first; t < own.last; t++) {
        const auto factor = Lanes::set1(at(kind, factors, t));
        const void* from = row_of(kind, x, t * width);
        void* to = const_cast<void*>(row_of(kind, out, t * width));
        for (int64_t i = 0; i < width; i += 16) write_some(kind, to, i, width - i, Lanes::mul(factor, read_some(kind, from, i, width - i)));
    }
}

inline void widen(const void* x, float* out, int64_t count, int part, int parts) {
    const auto own = vectors(count, part, parts);
    for (int64_t i = own.first; i < own.last; i += 16)
        write_some(Activation::f32, out, i, own.last - i, read_some(Activation::bf16, x, i, own.last - i));
}

}  // namespace
