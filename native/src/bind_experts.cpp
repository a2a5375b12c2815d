// What Python sees of products by head, routers and experts: addresses and sizes in, as in module.cpp.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "bind.h"
#include "desk.h"
#include "kernels.h"
#include "step.h"
#include "team.h"

namespace nb = nanobind;

namespace {

using Shaped = std::tuple<int, int64_t, int64_t, int64_t, bool>;

constexpr int kPieces = 4;  // in which the packing of a head's tokens is shared

/// Each head's part of a token times the head's own weight, `weight_bytes` from head to head.
void by_head(int kind, int64_t inputs, int64_t outputs, uintptr_t weight, int activation, uintptr_t x, int64_t x_stride, int64_t head_stride,
             uintptr_t out, int64_t tokens, int64_t heads) {
    const Shape shape = shape_of(kind, inputs, outputs, 0, false);
    const int64_t words = packed_words(shape, false), item = activation == int(Activation::f32) ? 4 : 2;
    const auto of_head = [=](int64_t now, int64_t head) {
        return Linear{shape, at<const uint8_t>(weight) + head * shape.bytes(), nullptr, false, Activation(activation),
                      at<const char>(x) + head * head_stride * item, x_stride, at<char>(out) + head * outputs * item, heads * outputs, now};
    };
    const auto scratch_of = [=](int64_t now, int64_t head) { return static_cast<uint32_t*>(step::scratch()) + head * now * words; };
    step::reserve(size_t(tokens * heads * words) * 4);
    step::perform(tokens, heads * inputs, [=](int64_t now, int part, int parts) {
        const auto own = team::share(heads * kPieces, part, parts);
        for (int64_t i = own.first; i < own.last; i++) chosen->pack(of_head(now, i / kPieces), scratch_of(now, i / kPieces), int(i % kPieces), kPieces);
    });
    step::perform(tokens, heads * inputs * outputs, [=](int64_t now, int part, int parts) {
        const int groups = int(shape.groups());
        const auto own = team::share(heads * groups, part, parts);
        for (int64_t i = own.first; i < own.last; i++) {
            const Linear l = of_head(now, i / groups);
            chosen->linears(&l, 1, scratch_of(now, i / groups), int(i % groups), groups);
        }
    }, {at<const uint8_t>(weight), heads * shape.bytes()});
}

/// Rows of two tensors side by side. Sizes and strides in bytes; a token has `heads` rows.
void join(uintptr_t a, int64_t a_stride, int64_t a_head_stride, int64_t a_bytes, uintptr_t b, int64_t b_stride, int64_t b_head_stride, int64_t b_bytes,
          uintptr_t out, int64_t tokens, int64_t heads) {
    step::perform(tokens, heads * (a_bytes + b_bytes) / 4, [=](int64_t now, int part, int parts) {
        const auto own = team::share(now, part, parts);
        char* to = at<char>(out) + own.first * heads * (a_bytes + b_bytes);
        for (int64_t t = own.first; t < own.last; t++)
            for (int64_t h = 0; h < heads; h++, to += a_bytes + b_bytes) {
                std::memcpy(to, at<const char>(a) + t * a_stride + h * a_head_stride, size_t(a_bytes));
                std::memcpy(to + a_bytes, at<const char>(b) + t * b_stride + h * b_head_stride, size_t(b_bytes));
            }
    });
}

void sigmoid(int activation, uintptr_t x, uintptr_t out, int64_t tokens, int64_t width) {
    step::perform(tokens, width, [=](int64_t now, int part, int parts) {
        chosen->sigmoid(Activation(activation), at<const void>(x), at<void>(out), now * width, part, parts);
    });
}

void scaled(int activation, uintptr_t x, uintptr_t factors, uintptr_t out, int64_t tokens, int64_t width) {
    step::perform(tokens, width, [=](int64_t now, int part, int parts) {
        chosen->scaled(Activation(activation), at<const void>(x), at<const void>(factors), at<void>(out), now, width, part, parts);
    });
}

void widen(uintptr_t x, uintptr_t out, int64_t tokens, int64_t width) {
    step::perform(tokens, width, [=](int64_t now, int part, int parts) { chosen->widen(at<const void>(x), at<float>(out), now * width, part, parts); });
}

void route(uintptr_t logits, uintptr_t bias, bool sigmoid, bool normalise, int64_t experts, int64_t top, int64_t groups, int64_t best_groups,
           float scaling, uintptr_t weights, uintptr_t experts_chosen, int64_t tokens) {
    const Route r{at<const float>(logits), at<const float>(bias), sigmoid, normalise, experts, top, groups, best_groups, scaling, at<float>(weights),
                  at<int64_t>(experts_chosen), 0};
    step::perform(tokens, experts * (top + 16), [r](int64_t now, int part, int parts) {
        Route own = r;
        own.tokens = now;
        chosen->route(own, part, parts);
    });
}

Shape shape_of(const Shaped& s) { return std::apply([](auto... part) { return shape_of(part...); }, s); }

/// `addresses`: of the packed weights of all gates, all ups and all downs.
void experts(const Shaped& in, bool in_whole, const Shaped& down, bool down_whole, std::vector<uintptr_t> addresses, int64_t top, int activation,
             uintptr_t x, int64_t x_stride, uintptr_t weights, uintptr_t experts_chosen, uintptr_t out, int64_t tokens) {
    const auto held = std::make_shared<const std::vector<uintptr_t>>(std::move(addresses));
    const Experts e{shape_of(in), shape_of(down), in_whole, down_whole, held->data(), int64_t(held->size()) / 3, top, Activation(activation),
                    at<const void>(x), x_stride, at<const float>(weights), at<const int64_t>(experts_chosen), at<void>(out), tokens};
    step::reserve(size_t(desk_of(e, nullptr).bytes));
    const int64_t read = top * e.in.inputs, middle = top * e.down.inputs;
    const auto perform = [&](Stage stage, int64_t size) {
        step::perform(tokens, size, [e, held, stage](int64_t now, int part, int parts) {
            Experts own = e;
            own.tokens = now;
            chosen->experts(own, stage, step::scratch(), part, parts);
        });
    };
    perform(Stage::sort, 0);
    perform(Stage::pack, read);
    perform(Stage::swiglu, 2 * read * e.in.outputs);
    perform(Stage::pack_down, middle);
    perform(Stage::down, middle * e.down.outputs);
    perform(Stage::combine, top * e.down.outputs);
}

}  // namespace

void bind_experts(nb::module_& m) {
    const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
    m.def("by_head", &by_head, free_gil);
    m.def("join", &join, free_gil);
    m.def("sigmoid", &sigmoid, free_gil);
    m.def("scaled", &scaled, free_gil);
    m.def("widen", &widen, free_gil);
    m.def("route", &route, free_gil);
    m.def("experts", &experts, free_gil);
}
