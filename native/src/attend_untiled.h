// Attention of an instruction set without tiles: all of its products on vector registers.
#pragma once
#include "attend_vectors.h"

namespace {

using on_vectors::add;
using on_vectors::gather_queries;
using on_vectors::score;

}  // namespace
