// Attention of an instruction set without tiles: all of its products on vector registers.
#pragma once
#include "attend_vectors.h"

namespace {

inline Way way_for(const Attention&, const Item&) { return {on_vectors::gather_queries, on_vectors::take_step}; }

/// For scores alone, of any item.
inline Way way_of_scores(const Attention&) { return {on_vectors::gather_queries, on_vectors::score_step}; }

/// Key heads of one query that an item may have.
inline int64_t key_heads_together(const Attention&) { return 1; }

}  // namespace
