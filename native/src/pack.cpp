#include "pack.h"

#include <algorithm>
#include <cstring>

#include "team.h"

void pack_dense(const Kernels& table, const Shape& shape, const void* weight, int64_t stride, uint8_t* out, int threads) {
    const int64_t rows = shape.rows_a_scale(), bytes = shape.kind == Weight::f32 ? 4 : 2;
    team::each(threads, [&](int thread, int count) {
        const auto own = team::share(shape.groups(), thread, count);
        for (int64_t g = own.first; g < own.last; g++) {
            uint8_t* group = out + g * shape.group_bytes();
            const int64_t outputs = std::min<int64_t>(kGroup, shape.outputs - g * kGroup);
            if (outputs < kGroup) std::memset(group, 0, size_t(shape.group_bytes()));
            table.lay_words(static_cast<const char*>(weight) + g * kGroup * stride * bytes, stride * bytes, outputs, rows, group);
        }
    });
}

void pack_coded(const Kernels& table, const Shape& shape, const uint8_t* codes, const float* scale, const uint8_t* zero, uint8_t* out, int threads) {
    const int64_t rows = shape.rows_a_scale(), scales = shape.scales();
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
                const uint8_t* from = codes + first * shape.inputs + s * shape.scale_inputs;
                if (shape.kind == Weight::int4) table.lay_halves(from, shape.inputs, outputs, rows, part);
                else table.lay_words(from, shape.inputs, outputs, rows, part);
                part += rows * kRowBytes;
            }
        }
    });
}
