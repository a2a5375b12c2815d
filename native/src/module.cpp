// What Python sees: addresses and sizes in, nothing out. Shapes and dtypes are checked by the callers in ops/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "team.h"

namespace nb = nanobind;

namespace {

const Kernels* chosen = nullptr;
int threads = 1;

/// Packed activations of the present call. Grown when needed and kept: a steady engine allocates nothing here.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    void* of(size_t bytes) {
        if (bytes <= size_) return memory_;
        std::free(memory_);
        size_ = 0;
        const size_t wanted = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        memory_ = std::aligned_alloc(4096, wanted);
        if (!memory_) throw std::bad_alloc();
        size_ = wanted;
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
} scratch;

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

Shape shape_of(int kind, int64_t inputs, int64_t outputs, int64_t scale_inputs, bool zeros) {
    return {Weight(kind), inputs, outputs, scale_inputs, zeros};
}

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (auto table = runnable(); *table; table++) all.emplace_back((*table)->name);
    return all;
}

void choose(const std::string& name) {
    for (auto table = runnable(); *table; table++)
        if (name == (*table)->name) chosen = *table;
    if (!chosen || name != chosen->name) throw std::invalid_argument("this processor has no " + name);
}

void linear(int kind, int64_t inputs, int64_t outputs, int64_t scale_inputs, bool zeros, uintptr_t weight, uintptr_t bias, bool whole, int activation,
            uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t tokens) {
    if (tokens == 0) return;
    const Linear l{shape_of(kind, inputs, outputs, scale_inputs, zeros), at<const uint8_t>(weight), at<const float>(bias), whole,
                   Activation(activation), at<const void>(x), x_stride, at<void>(out), out_stride, tokens};
    void* memory = scratch.of(size_t(tokens) * size_t(inputs + l.shape.scales() + 1) * 4);
    team::each(threads, [&](int thread, int count) { chosen->linear(l, memory, thread, count); });
}

void norm(int activation, uintptr_t x, int64_t x_stride, int weight_kind, uintptr_t weight, float eps, uintptr_t out, int64_t out_stride, int64_t tokens,
          int64_t width) {
    const Norm n{Activation(activation), at<const void>(x), x_stride, Activation(weight_kind), at<const void>(weight), eps, at<void>(out), out_stride, tokens, width};
    team::each(tokens > 8 ? threads : 1, [&](int thread, int count) { chosen->norm(n, thread, count); });
}

void rope(int activation, uintptr_t x, int64_t x_stride, int64_t head_stride, uintptr_t cos, uintptr_t sin, bool interleaved, uintptr_t out, int64_t tokens,
          int64_t heads, int64_t width) {
    const Rope r{Activation(activation), at<const void>(x), x_stride, head_stride, at<const float>(cos), at<const float>(sin), interleaved,
                 at<void>(out), tokens, heads, width};
    team::each(tokens > 4 ? threads : 1, [&](int thread, int count) { chosen->rope(r, thread, count); });
}

constexpr int64_t kFew = 8192;  // numbers that one thread has done before another has heard of them

void silu_mul(int activation, uintptr_t gate, uintptr_t up, uintptr_t out, int64_t count) {
    team::each(count > kFew ? threads : 1, [&](int thread, int all) {
        chosen->silu_mul(Activation(activation), at<const void>(gate), at<const void>(up), at<void>(out), count, thread, all);
    });
}

void add(int activation, uintptr_t a, uintptr_t b, uintptr_t out, int64_t count) {
    team::each(count > kFew ? threads : 1, [&](int thread, int all) {
        chosen->add(Activation(activation), at<const void>(a), at<const void>(b), at<void>(out), count, thread, all);
    });
}


void attention(int activation, uintptr_t q, int64_t q_stride, uintptr_t keys, int64_t key_stride, int64_t key_head_stride, uintptr_t values,
               int64_t value_stride, int64_t value_head_stride, int64_t page_tokens, uintptr_t chunks, int64_t chunk_count, uintptr_t tables, int reach,
               int64_t reach_a, int64_t reach_b, int64_t reach_c, float scale, int64_t heads, int64_t kv_heads, int64_t key_width, int64_t value_width,
               uintptr_t out) {
    const Attention a{Activation(activation), at<const void>(q), q_stride, at<const void>(keys), at<const void>(values), key_stride, value_stride,
                      key_head_stride, value_head_stride, page_tokens, at<const Chunk>(chunks), chunk_count, at<const int32_t>(tables),
                      {reach, reach_a, reach_b, reach_c}, scale, heads, kv_heads, key_width, value_width, at<void>(out)};
    team::reset();
    team::each(threads, [&](int thread, int count) { chosen->attention(a, thread, count); });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Kernels for processors. Addresses and sizes in; see ops/native.py.";
    const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
    m.def("names", &names);
    m.def("choose", &choose);
    m.def("chosen", [] { return std::string(chosen ? chosen->name : ""); });
    m.def("share_threads", [](uintptr_t parallel, uintptr_t number, uintptr_t count) { team::use(parallel, number, count); });
    m.def("set_threads", [](int count) { threads = team::shared() ? count : 1; });
    m.def("threads", [] { return threads; });
    m.def("packed_bytes", [](int kind, int64_t i, int64_t o, int64_t s, bool z) { return shape_of(kind, i, o, s, z).bytes(); });
    m.def("pack_dense", [](int kind, int64_t i, int64_t o, uintptr_t w, int64_t stride, uintptr_t out) {
        pack_dense(shape_of(kind, i, o, 0, false), at<const void>(w), stride, at<uint8_t>(out), threads);
    }, free_gil);
    m.def("pack_coded", [](int kind, int64_t i, int64_t o, int64_t s, bool z, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t out) {
        pack_coded(shape_of(kind, i, o, s, z), at<const uint8_t>(codes), at<const float>(scale), at<const uint8_t>(zero), at<uint8_t>(out), threads);
    }, free_gil);
    m.def("linear", &linear, free_gil);
    m.def("norm", &norm, free_gil);
    m.def("rope", &rope, free_gil);
    m.def("silu_mul", &silu_mul, free_gil);
    m.def("add", &add, free_gil);
    m.def("attention", &attention, free_gil);
}
