"""Attention over the paged cache, for the packed tokens of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import LatentQuery, Reach
from lineshaft.ops import table as ops
from lineshaft.sched.scheduler import Plan


@dataclass(frozen=True)
class Span:
    """Where one request's tokens lie in the packed row, and which pages hold its context."""

    rows: slice
    first: int
    """Position of the first of them."""
    table: Tensor
    """int64 page numbers in order of position."""


class PagedAttend:
    """Implements model.attend.Attend for one plan: writes the new keys first, then lets each request look at its own pages."""

    def __init__(self, cache: PagedCache, plan: Plan) -> None:
        self.cache = cache
        self.spans: list[Span] = []
        slots, row = [], 0
        for chunk in plan.chunks:
            table, size = torch.tensor(chunk.request.pages), chunk.last - chunk.first
            positions = torch.arange(chunk.first, chunk.last)
            slots.append(table[positions // cache.page_tokens] * cache.page_tokens + positions % cache.page_tokens)
            self.spans.append(Span(slice(row, row + size), chunk.first, table))
            row += size
        self.slots_T = torch.cat(slots)

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        self.cache.write(layer, self.slots_T, k_TKD, v_TKD)
        pages_k, pages_v = self.cache.parts[layer]
        return torch.cat(
            [ops.paged_gqa(q_THD[span.rows], pages_k, pages_v, span.table, span.first, reach.scale, reach.window) for span in self.spans]
        )

    def mla(self, layer: int, query: LatentQuery, latent_TC: Tensor, k_rope_TR: Tensor, reach: Reach) -> Tensor:
        """See model.attend.Attend. Absorbs the up-projection: nothing is expanded, however long the context."""
        self.cache.write(layer, self.slots_T, torch.cat([latent_TC, k_rope_TR], -1))
        (pages,) = self.cache.parts[layer]
        q_THC, up_value_HVC = query.absorb()
        latents = [
            ops.paged_mla(q_THC[span.rows], query.rope_THR[span.rows], pages, span.table, span.first, reach.scale) for span in self.spans
        ]
        return torch.einsum("thc,hvc->thv", torch.cat(latents), up_value_HVC)
