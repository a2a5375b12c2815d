"""Attention over the paged cache, request by request: the fast form for long prompts, whose last bits depend on the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.ops import table as ops
from lineshaft.ops.reach import Reach
from lineshaft.sched.plan import Plan


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
        self.spans: list[list[Span]] = [[] for _ in cache.groups]
        self.slots: list[Tensor] = []
        for group, spans in enumerate(self.spans):
            slots, row = [], 0
            for chunk in plan.chunks:
                table, size = torch.tensor(chunk.request.tables[group]), chunk.last - chunk.first
                positions = torch.arange(chunk.first, chunk.last)
                slots.append(table[positions // cache.page_tokens] * cache.page_tokens + positions % cache.page_tokens)
                spans.append(Span(slice(row, row + size), chunk.first, table))
                row += size
            self.slots.append(torch.cat(slots))

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        group = self.cache.group_of[layer]
        self.cache.write(layer, self.slots[group], k_TKD, v_TKD)
        pages_k, pages_v = self.cache.parts[layer]
        spans = self.spans[group]
        outs = [ops.paged_gqa(q_THD[span.rows], pages_k, pages_v, span.table, span.first, scale, reach) for span in spans]
        return torch.cat(outs)

    def mla(
        self,
        layer: int,
        query: LatentQuery,
        latent_TC: Tensor,
        k_rope_TR: Tensor,
        scale: float,
        reach: Reach,
        index: IndexQuery | None = None,
    ) -> Tensor:
        """See model.attend.Attend. Absorbs the up-projection: nothing is expanded, however long the context."""
        kept = [torch.cat([latent_TC, k_rope_TR], -1)] if index is None else [torch.cat([latent_TC, k_rope_TR], -1), index.key_TD]
        group = self.cache.group_of[layer]
        self.cache.write(layer, self.slots[group], *kept)
        pages, *index_pages = self.cache.parts[layer]
        q_THC = query.absorbed()
        latents: list[Tensor] = []
        for span in self.spans[group]:
            q, q_rope, last = q_THC[span.rows], query.rope_THR[span.rows], span.first + span.rows.stop - span.rows.start
            if index is None or last <= index.top_k:
                latents.append(ops.paged_mla(q, q_rope, pages, span.table, span.first, scale, reach))
                continue
            keys_SD = ops.paged_rows(index_pages[0], span.table, torch.arange(last))
            for rows, chosen_TS in index.of(span.rows).tiles(keys_SD, reach):
                latents.append(ops.paged_chosen_mla(q[rows], q_rope[rows], pages, span.table, chosen_TS, scale))
        return query.values(torch.cat(latents))
