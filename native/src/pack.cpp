#include "pack.h"

#include <algorithm>
#include <cstring>

#include "team.h"

namespace {

constexpr int64_t kTogether = 16;  // rows of the layout filled together: 4 KB, which stay in the nearest cache

/// Calls fn(output of the group, row, its place) for all words of a group, some neighbouring rows at a time.
template <class Fn>
void each_word(int64_t rows, int64_t outputs, uint8_t* group, Fn fn) {
    for (int64_t start = 0; start < rows; start += kTogether)
        for (int64_t o = 0; o < outputs; o++)
            for (int64_t row = start; row < std::min(rows, start + kTogether); row++) fn(o, row, group + row * kRowBytes + o * 4);
}

}  // namespace

void pack_dense(const Shape& shape, const void* weight, int64_t stride, uint8_t* out, int threads) {
    const int64_t rows = shape.rows_a_scale(), bytes = shape.kind == Weight::f32 ? 4 : 2;
    team::each(threads, [&](int thread, int count) {
        const auto own = team::share(shape.groups(), thread, count);
        for (int64_t g = own.first; g < own.last; g++) {
            uint8_t* group = out + g * shape.group_bytes();
            const int64_t outputs = std::min<int64_t>(kGroup, shape.outputs - g * kGroup);
            if (outputs < kGroup) std::memset(group, 0, size_t(shape.group_bytes()));
            const auto* from = static_cast<const char*>(weight) + g * kGroup * stride * bytes;
            each_word(rows, outputs, group, [&](int64_t o, int64_t row, uint8_t* to) { std::memcpy(to, from + o * stride * bytes + row * 4, 4); });
        }
    });
}

void pack_coded(const Shape& shape, const uint8_t* codes, const float* scale, const uint8_t* zero, uint8_t* out, int threads) {
    const int64_t rows = shape.rows_a_scale(), scales = shape.scales(), wide = inputs_a_row(shape.kind);
    team::each(threads, [&](int thread, int count) {
        const auto own = team::share(shape.groups(), thread, count);
        for (int64_t g = own.first; g < own.last; g++) {
            uint8_t* part = out + g * shape.group_bytes();
            const int64_t outputs = std::min<int64_t>(kGroup, shape.outputs - g * kGroup), first = g * kGroup;
            if (outputs < kGroup) std::memset(part, 0, size_t(shape.group_bytes()));
            for (int64_t s = 0; s < scales; s++) {
                for (int64_t o = 0; o < outputs; o++) {
                    std::memcpy(part + o * 4, scale + (first + o) * scales + s, 4);
                    if (shape.zeros) part[kGroup * 4 + o] = zero[(first + o) * scales + s];
                }
                part += shape.header_bytes();
                each_word(rows, outputs, part, [&](int64_t o, int64_t row, uint8_t* to) {
                    const uint8_t* from = codes + (first + o) * shape.inputs + s * shape.scale_inputs + row * wide;
                    if (shape.kind == Weight::int8) std::memcpy(to, from, 4);
                    else for (int i = 0; i < 4; i++) to[i] = uint8_t(from[i] | (from[i + 4] << 4));
                });
                part += rows * kRowBytes;
            }
        }
    });
}
