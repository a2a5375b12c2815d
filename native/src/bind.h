// What the files that hand functions to Python share.
#pragma once
#include <nanobind/nanobind.h>

#include "packed.h"

namespace {

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline Shape shape_of(int kind, int64_t inputs, int64_t outputs, int64_t scale_inputs, bool zeros) {
    return {Weight(kind), inputs, outputs, scale_inputs, zeros};
}

}  // namespace

/// Products by head, routers, experts, and the small ones around them.
void bind_experts(nanobind::module_& m);
