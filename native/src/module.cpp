// What Python sees: addresses and sizes in, nothing out. Shapes and dtypes are checked by the callers in ops/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "kernels.h"
#include "pack.h"
#include "step.h"
#include "team.h"
#include "trial.h"

namespace nb = nanobind;

namespace {

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (auto table = runnable(); *table; table++) all.emplace_back((*table)->name);
    return all;
}

const Kernels& named(const std::string& name) {
    for (auto table = runnable(); *table; table++)
        if (name == (*table)->name) return **table;
    throw std::invalid_argument("this processor has no " + name);
}

/// Activations into tiles, for products by weights like that of `l`, unless they are there; what the scratch then holds.
step::Contents pack_for(const Linear& l) {
    step::reserve(size_t(l.tokens) * size_t(l.shape.inputs + l.shape.scales() + 1) * 4);
    const step::Contents packed{int64_t(l.x), l.x_stride, int64_t(l.activation), int64_t(l.shape.kind), l.shape.inputs, l.shape.scale_inputs, l.shape.zeros,
                                1 + int64_t(l.whole), int64_t(std::bit_cast<int32_t>(l.input_scale))};
    if (!step::holds(packed))  // else another weight, such as that of keys after that of queries, met the same activations
        step::perform(l.tokens, l.shape.inputs, [l](int64_t now, int part, int parts) {
            Linear own = l;
            own.tokens = now;
            chosen->pack(own, step::scratch(), part, parts);
        });
    return packed;
}

constexpr size_t kNeighbours = 4;

/// Weights that meet the same activations in one call.
struct Neighbours {
    std::array<Linear, kNeighbours> linears;
    int64_t count;

    Neighbours with(int64_t tokens) const {
        Neighbours own = *this;
        for (auto& l : own.linears) l.tokens = tokens;
        return own;
    }
    step::Stream stream() const {  // as far as they lie one behind another, which they need not
        int64_t bytes = 0;
        for (int64_t i = 0; i < count; i++) bytes += linears[i].shape.bytes();
        return {linears[0].weight, bytes};
    }
    int64_t outputs() const {
        int64_t all = 0;
        for (int64_t i = 0; i < count; i++) all += linears[i].shape.outputs;
        return all;
    }
};

/// The products, all at once. `changed`: a result lies where the activations lay.
void multiply(const Neighbours& n, bool changed = false) {
    const Linear& first = n.linears[0];
    const step::Contents packed = pack_for(first);
    step::perform(first.tokens, first.shape.inputs * n.outputs(), [n](int64_t now, int part, int parts) {
        chosen->linears(n.with(now).linears.data(), n.count, step::scratch(), part, parts);
    }, n.stream());
    if (!changed) step::left(packed);
}

void linear(int kind, int64_t inputs, int64_t outputs, int64_t scale_inputs, bool zeros, uintptr_t weight, uintptr_t bias, bool whole, int activation,
            uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t tokens, bool wide, float input_scale, uintptr_t added, int64_t added_stride) {
    const Linear l{shape_of(kind, inputs, outputs, scale_inputs, zeros), at<const uint8_t>(weight), at<const float>(bias), whole,
                   Activation(activation), at<const void>(x), x_stride, at<void>(out), out_stride, tokens, nullptr, wide, input_scale,
                   at<const void>(added), added_stride};
    multiply({{l}, 1}, out == x);
}

using Addresses = std::vector<uintptr_t>;

Neighbours neighbours_of(int kind, int64_t inputs, int64_t scale_inputs, bool zeros, const std::vector<int64_t>& outputs, const Addresses& weights,
                         const Addresses& biases, bool whole, int activation, uintptr_t x, int64_t x_stride, int64_t tokens, float input_scale) {
    const size_t count = outputs.size();
    if (count == 0 || count > kNeighbours || weights.size() != count || biases.size() != count) throw std::invalid_argument("not so many products at once");
    Neighbours n{{}, int64_t(count)};
    for (size_t i = 0; i < count; i++)
        n.linears[i] = Linear{shape_of(kind, inputs, outputs[i], scale_inputs, zeros), at<const uint8_t>(weights[i]), at<const float>(biases[i]), whole,
                              Activation(activation), at<const void>(x), x_stride, nullptr, outputs[i], tokens, nullptr, false, input_scale};
    return n;
}

/// Results are dense, each by itself.
void linears(int kind, int64_t inputs, int64_t scale_inputs, bool zeros, const std::vector<int64_t>& outputs, const Addresses& weights, const Addresses& biases,
             bool whole, int activation, uintptr_t x, int64_t x_stride, const Addresses& outs, int64_t tokens, float input_scale) {
    Neighbours n = neighbours_of(kind, inputs, scale_inputs, zeros, outputs, weights, biases, whole, activation, x, x_stride, tokens, input_scale);
    if (outs.size() != outputs.size()) throw std::invalid_argument("not as many results as products");
    for (size_t i = 0; i < outs.size(); i++) n.linears[i].out = at<void>(outs[i]);
    multiply(n);
}

/// SiLU of the product by the first weight times that by the second.
void swiglu(int kind, int64_t inputs, int64_t scale_inputs, bool zeros, int64_t outputs, const Addresses& weights, const Addresses& biases, bool whole,
            int activation, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t tokens, float input_scale) {
    Neighbours n = neighbours_of(kind, inputs, scale_inputs, zeros, {outputs, outputs}, weights, biases, whole, activation, x, x_stride, tokens, input_scale);
    n.linears[1].out = at<void>(out);
    pack_for(n.linears[0]);
    step::perform(tokens, 2 * inputs * outputs, [n](int64_t now, int part, int parts) {
        chosen->swiglu(n.with(now).linears.data(), step::scratch(), part, parts);
    }, {n.linears[0].weight, n.linears[0].shape.bytes()});
}

void norm(int activation, uintptr_t x, int64_t x_stride, int weight_kind, uintptr_t weight, float eps, uintptr_t out, int64_t out_stride, int64_t tokens,
          int64_t a_token, int64_t width) {
    const Norm n{Activation(activation), at<const void>(x), x_stride, Activation(weight_kind), at<const void>(weight), eps, at<void>(out), out_stride,
                 0, width};
    step::perform(tokens, a_token * width, [n, a_token](int64_t now, int part, int parts) {
        Norm own = n;
        own.tokens = now * a_token;
        chosen->norm(own, part, parts);
    });
}

void layer_norm(int activation, uintptr_t x, int64_t x_stride, int weight_kind, uintptr_t weight, int bias_kind, uintptr_t bias, float eps, uintptr_t out,
                int64_t tokens, int64_t width) {
    const Centred c{{Activation(activation), at<const void>(x), x_stride, Activation(weight_kind), at<const void>(weight), eps, at<void>(out), width, 0, width},
                    Activation(bias_kind), at<const void>(bias)};
    step::perform(tokens, 2 * width, [c](int64_t now, int part, int parts) {
        Centred own = c;
        own.norm.tokens = now;
        chosen->centred(own, part, parts);
    });
}

void rope(int activation, uintptr_t x, int64_t x_stride, int64_t head_stride, uintptr_t cos, uintptr_t sin, bool interleaved, uintptr_t out, int64_t tokens,
          int64_t heads, int64_t width) {
    const Rope r{Activation(activation), at<const void>(x), x_stride, head_stride, at<const float>(cos), at<const float>(sin), interleaved,
                 at<void>(out), tokens, heads, width};
    step::perform(tokens, heads * width, [r](int64_t now, int part, int parts) {
        Rope own = r;
        own.tokens = now;
        chosen->rope(own, part, parts);
    });
}

void silu_mul(int activation, uintptr_t gate, uintptr_t up, uintptr_t out, int64_t tokens, int64_t width) {
    step::perform(tokens, width, [=](int64_t now, int part, int parts) {
        chosen->silu_mul(Activation(activation), at<const void>(gate), at<const void>(up), at<void>(out), now * width, part, parts);
    });
}

void add(int activation, uintptr_t a, uintptr_t b, uintptr_t out, int64_t tokens, int64_t width) {
    step::perform(tokens, width, [=](int64_t now, int part, int parts) {
        chosen->add(Activation(activation), at<const void>(a), at<const void>(b), at<void>(out), now * width, part, parts);
    });
}

/// out[t] = table[rows[t]], rows of `bytes` bytes.
void take_rows(uintptr_t table, int64_t bytes, uintptr_t rows, uintptr_t out, int64_t tokens) {
    step::perform(tokens, bytes, [=](int64_t now, int part, int parts) {
        const auto own = team::share(now, part, parts);
        for (int64_t t = own.first; t < own.last; t++)
            std::memcpy(at<char>(out) + t * bytes, at<const char>(table) + at<const int64_t>(rows)[t] * bytes, size_t(bytes));
    });
}

/// table[rows[t]] = x[t], `stride` bytes from token to token.
void put_rows(uintptr_t x, int64_t stride, int64_t bytes, uintptr_t rows, uintptr_t table, int64_t tokens) {
    step::perform(tokens, bytes, [=](int64_t now, int part, int parts) {
        const auto own = team::share(now, part, parts);
        for (int64_t t = own.first; t < own.last; t++)
            std::memcpy(at<char>(table) + at<const int64_t>(rows)[t] * bytes, at<const char>(x) + t * stride, size_t(bytes));
    });
}

void angles(uintptr_t positions, uintptr_t speeds, int64_t speed_stride, int64_t count, float length, uintptr_t cos, uintptr_t sin, int64_t tokens) {
    step::perform(tokens, 16 * count, [=](int64_t now, int part, int parts) {
        const auto own = team::share(now, part, parts);
        for (int64_t t = own.first; t < own.last; t++)
            for (int64_t r = 0; r < count; r++) {
                const float angle = float(at<const int64_t>(positions)[t]) * at<const float>(speeds)[t * speed_stride + r];
                at<float>(cos)[t * count + r] = std::cos(angle) * length;
                at<float>(sin)[t * count + r] = std::sin(angle) * length;
            }
    });
}

void write_codes(int activation, uintptr_t x, int64_t x_stride, int64_t head_stride, uintptr_t slots, uintptr_t pages, int64_t tokens, int64_t heads, int64_t width) {
    const Entries e{Activation(activation), at<const void>(x), x_stride, head_stride, at<const int64_t>(slots), at<uint8_t>(pages), tokens, heads, width};
    step::perform(tokens, heads * width, [e](int64_t now, int part, int parts) {
        Entries own = e;
        own.tokens = now;
        chosen->write_codes(own, part, parts);
    });
}

void attention(int activation, bool coded, uintptr_t q, int64_t q_stride, uintptr_t keys, int64_t key_stride, int64_t key_head_stride, uintptr_t values,
               int64_t value_stride, int64_t value_head_stride, int64_t page_tokens, uintptr_t chunks, uintptr_t chunk_count, uintptr_t tables, int reach,
               int64_t reach_a, int64_t reach_b, int64_t reach_c, float scale, int64_t heads, int64_t kv_heads, int64_t key_width, int64_t value_width,
               uintptr_t out, int64_t tokens) {
    const Attention a{Activation(activation), coded, at<const void>(q), q_stride, at<const void>(keys), at<const void>(values), key_stride, value_stride,
                      key_head_stride, value_head_stride, page_tokens, at<const Chunk>(chunks), 0, at<const int32_t>(tables),
                      {reach, reach_a, reach_b, reach_c}, scale, heads, kv_heads, key_width, value_width, step::threads(), at<void>(out)};
    step::perform(tokens, 1 << 20, [a, chunk_count](int64_t, int part, int parts) {
        Attention own = a;
        own.chunk_count = *at<const int64_t>(chunk_count);
        chosen->attention(own, part, parts);
    });
}

/// Scores, then the choice: as many chunks as there are tokens.
void choose(int activation, uintptr_t q, uintptr_t weights, uintptr_t keys, int64_t key_stride, int64_t page_tokens, uintptr_t chunks, uintptr_t chunk_count,
            uintptr_t tables, int reach, int64_t reach_a, int64_t reach_b, int64_t reach_c, float scale, int64_t heads, int64_t width, int64_t top,
            uintptr_t room, int64_t room_tokens, int64_t longest, uintptr_t slots, uintptr_t found, uintptr_t count, int64_t tokens) {
    const Attention asked{Activation(activation), false, at<const void>(q), heads * width, at<const void>(keys), at<const void>(keys), key_stride, key_stride, 0, 0,
                          page_tokens, at<const Chunk>(chunks), 0, at<const int32_t>(tables), {reach, reach_a, reach_b, reach_c}, scale, heads, 1, width, 0,
                          step::threads(), nullptr};
    const Choosing c{asked, at<const float>(weights), top, 0, at<float>(room), room_tokens, longest, at<int32_t>(slots), at<Chunk>(found)};
    const auto now_with = [c, chunk_count](int64_t now) {
        Choosing own = c;
        own.heads.chunk_count = *at<const int64_t>(chunk_count);
        own.tokens = now;
        return own;
    };
    step::perform(tokens, 1 << 20, [now_with](int64_t now, int part, int parts) { chosen->score_together(now_with(now), part, parts); });
    step::perform(tokens, 1 << 20, [now_with, count](int64_t now, int part, int parts) {
        if (part == 0) *at<int64_t>(count) = now;
        chosen->choose(now_with(now), part, parts);
    });
}

void sample(uintptr_t logits, int64_t stride, int64_t width, uintptr_t choices, uintptr_t tokens, int64_t rows) {
    const Sample s{at<const float>(logits), stride, width, at<const Choice>(choices), at<int64_t>(tokens), 0};
    step::perform(rows, width, [s](int64_t now, int part, int parts) {
        Sample own = s;
        own.rows = now;
        chosen->sample(own, part, parts);
    });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Kernels for processors. Addresses and sizes in; see ops/native.py.";
    const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
    m.def("names", &names);
    m.def("choose", [](const std::string& name) { chosen = &named(name); });
    m.def("chosen", [] { return std::string(chosen ? chosen->name : ""); });
    m.def("trial", [](const std::string& name) { return trial(named(name)); });
#ifdef LINESHAFT_SOFT_TILES
    m.attr("soft_tiles") = true;
    m.def("plant_fault", [](int fault) { planted_fault = Fault(fault); });
#else
    m.attr("soft_tiles") = false;
#endif
    m.def("share_threads", [](uintptr_t parallel, uintptr_t number, uintptr_t count) { team::use(parallel, number, count); });
    m.def("set_threads", &step::set_threads);
    m.def("threads", &step::threads);
    nb::class_<step::Step>(m, "Step").def("run", &step::Step::run, free_gil).def("__len__", &step::Step::size);
    m.def("begin_step", &step::begin);
    m.def("finish_step", &step::finish);
    m.def("end_step", &step::end);
    m.def("packed_bytes", [](int kind, int64_t i, int64_t o, int64_t s, bool z) { return shape_of(kind, i, o, s, z).bytes(); });
    m.def("pack_dense", [](int kind, int64_t i, int64_t o, uintptr_t w, int64_t stride, uintptr_t out) {
        pack_dense(*chosen, shape_of(kind, i, o, 0, false), at<const void>(w), stride, at<uint8_t>(out), step::threads());
    }, free_gil);
    m.def("pack_coded", [](int kind, int64_t i, int64_t o, int64_t s, bool z, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t out) {
        pack_coded(*chosen, shape_of(kind, i, o, s, z), at<const uint8_t>(codes), at<const float>(scale), at<const uint8_t>(zero), at<uint8_t>(out), step::threads());
    }, free_gil);
    m.def("linear", &linear, free_gil);
    m.def("linears", &linears, free_gil);
    m.def("swiglu", &swiglu, free_gil);
    m.def("norm", &norm, free_gil);
    m.def("layer_norm", &layer_norm, free_gil);
    m.def("rope", &rope, free_gil);
    m.def("silu_mul", &silu_mul, free_gil);
    m.def("add", &add, free_gil);
    m.def("take_rows", &take_rows, free_gil);
    m.def("put_rows", &put_rows, free_gil);
    m.def("angles", &angles, free_gil);
    m.def("write_codes", &write_codes, free_gil);
    m.def("attention", &attention, free_gil);
    m.def("choose_keys", &choose, free_gil);
    m.def("sample", &sample, free_gil);
    bind_experts(m);
}
