#include "trial.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "desk.h"
#include "guard.h"
#include "pack.h"

#ifdef LINESHAFT_SOFT_TILES
Fault planted_fault = Fault::none;
#endif

namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Memory = std::unique_ptr<T, Free>;

template <class T>
Memory<T> memory(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    Memory<T> made(static_cast<T*>(std::aligned_alloc(64, bytes)));
    std::memset(made.get(), 0, bytes);
    return made;
}

/// Whole numbers below `limit` without a pattern that a misplaced row or column would keep (Knuth's multiplicative hash).
int64_t whole(int64_t place, int64_t limit) { return int64_t((uint32_t(place) * 2654435761u) >> 12) % limit; }

uint16_t bf16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t(bits >> 16);
}

constexpr int64_t kOutputs = 70, kMost = 33;  // one group and a piece; a pair of tiles of tokens and a last one of one token

/// Numbers are small and whole and scales powers of two: every sum is exact in float32, in any order.
struct Case {
    Shape shape;
    Memory<uint8_t> weight;
    Memory<uint16_t> pairs;  // activations [kMost, inputs], bf16
    Memory<float> singles;   // the same in float32

    explicit Case(const Shape& s)
        : shape(s), weight(memory<uint8_t>(s.bytes())), pairs(memory<uint16_t>(kMost * s.inputs)), singles(memory<float>(kMost * s.inputs)) {
        for (int64_t i = 0; i < kMost * s.inputs; i++) {
            const float scale = float(1 << i / s.inputs % 3);  // of a token in 8 bits, because its largest number is 127 times that
            singles.get()[i] = scale * (i % s.inputs == 3 ? 127.0f : float(whole(i, 17) - 8));
            pairs.get()[i] = bf16_of(float(whole(i, 5) - 2));  // their sums are below 256 and so exact in bf16 too
        }
        const int64_t numbers = s.inputs * s.outputs;
        if (s.kind == Weight::bf16) {
            std::vector<uint16_t> dense(static_cast<size_t>(numbers));
            for (int64_t i = 0; i < numbers; i++) dense[size_t(i)] = bf16_of(float(whole(i + 1, 3) - 1));
            pack_dense(kScalar, s, dense.data(), s.inputs, weight.get(), 1);
            return;
        }
        std::vector<uint8_t> codes(static_cast<size_t>(numbers)), zeros(static_cast<size_t>(s.outputs * s.scales()));
        std::vector<float> scales(zeros.size());
        const uint8_t fp8[] = {0x38, 0x40, 0x44, 0xb8, 0x00, 0xc0, 0x30, 0x08, 0x84};  // 1, 2, 3, -1, 0, -2, 1/2, 1/64, -1/128 (a small one)
        for (int64_t i = 0; i < numbers; i++)
            codes[size_t(i)] = s.kind == Weight::fp8 ? fp8[whole(i + 2, 9)] : uint8_t(whole(i + 2, s.kind == Weight::int8 ? 256 : 16));
        for (size_t i = 0; i < zeros.size(); i++) zeros[i] = uint8_t(whole(int64_t(i) + 3, 16)), scales[i] = float(1 << whole(int64_t(i), 3));
        pack_coded(kScalar, s, codes.data(), scales.data(), zeros.data(), weight.get(), 1);
    }

    std::vector<float> product(const Kernels& table, int64_t tokens) const {
        const bool coded = shape.scale_inputs, rounded = coded && shape.kind != Weight::fp8;
        std::vector<float> out(static_cast<size_t>(tokens * shape.outputs));
        std::vector<uint16_t> narrow(out.size());
        const Linear l{shape, weight.get(), nullptr, rounded, coded ? Activation::f32 : Activation::bf16,
                       coded ? static_cast<const void*>(singles.get()) : pairs.get(), shape.inputs,
                       coded ? static_cast<void*>(out.data()) : narrow.data(), shape.outputs, tokens};
        const auto scratch = memory<uint32_t>(tokens * packed_words(shape, rounded));
        table.pack(l, scratch.get(), 0, 1);
        table.linears(&l, 1, scratch.get(), 0, 1);
        for (size_t i = 0; i < out.size() && !coded; i++) out[i] = float(narrow[i]);
        return out;
    }
};

std::string told(const Shape& s, int64_t tokens) {
    static const char* const kinds[] = {"float32", "bf16", "int8", "int4", "FP8"};
    std::string text = kinds[int(s.kind)];
    if (s.scale_inputs && s.scale_inputs < s.inputs) text += " in groups of " + std::to_string(s.scale_inputs);
    return text + ", " + std::to_string(s.inputs) + " inputs, " + std::to_string(tokens) + (tokens == 1 ? " token" : " tokens");
}

std::string difference(const Kernels& table) {
    const Shape shapes[] = {
        {Weight::bf16, 256, kOutputs, 0, false},      // more tiles than a chunk
        {Weight::bf16, 40, kOutputs, 0, false},       // tiles of ten rows
        {Weight::int8, 512, kOutputs, 512, false},    // more tiles than a chunk
        {Weight::int8, 64, kOutputs, 32, true},       // tiles of eight rows, a scale each
        {Weight::int8, 256, kOutputs, 128, false},
        {Weight::int4, 512, kOutputs, 512, true},     // more tiles than a chunk
        {Weight::int4, 128, kOutputs, 32, false},
        {Weight::fp8, 256, kOutputs, 128, false},
    };
    for (const Shape& shape : shapes) {
        const Case made(shape);
        const auto wanted = made.product(kScalar, kMost);
        for (const int64_t tokens : {int64_t(1), int64_t(7), int64_t(23), kMost}) {
            const auto got = made.product(table, tokens);
            if (std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) != 0) return told(shape, tokens);
        }
    }
    return "";
}

}  // namespace

std::string trial(const Kernels& table) {
    if (&table == &kScalar) return "";
    std::string found;
    return guard::survives([&] { found = difference(table); }) ? found : "it faults";
}
