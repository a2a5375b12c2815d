"""Attention over the paged cache by the native kernel: all requests of a step in one call, each number as if it were alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.ops import table as ops
from lineshaft.ops.checks import WIDEST
from lineshaft.ops.isa import library
from lineshaft.ops.reach import Reach
from lineshaft.sched.plan import Plan


def can_attend(config: ModelConfig) -> bool:
    """Is the kernel there, and can it do what this model asks for? It can't choose among keys (DeepSeek-V3.2's indexer)."""
    a = config.attention
    if library() is None:
        return False
    if isinstance(a, GroupedQueryAttention):
        return a.head_dim % 2 == 0 and a.head_dim <= WIDEST
    width = a.kv_lora_rank + a.qk_rope_head_dim
    return a.indexer is None and width % 2 == 0 and width <= WIDEST


class NativeAttend:
    """Implements model.attend.Attend for one plan: writes the new keys first, then lets each request look at its own pages."""

    def __init__(self, cache: PagedCache, plan: Plan) -> None:
        self.cache = cache
        self._slots: list[Tensor] = []
        self._chunks: list[Tensor] = []
        self._tables: list[Tensor] = []
        for group in range(len(cache.groups)):
            self._lay_out(group, plan)

    def _lay_out(self, group: int, plan: Plan) -> None:
        """Where a group's new keys go, the chunks, and the page numbers of their requests one after another."""
        size, row = self.cache.page_tokens, 0
        slots: list[int] = []
        chunks: list[tuple[int, int, int, int]] = []
        pages: list[int] = []
        for chunk in plan.chunks:
            table, count = chunk.request.tables[group], chunk.last - chunk.first
            slots += [table[place // size] * size + place % size for place in range(chunk.first, chunk.last)]
            chunks.append((row, chunk.first, count, len(pages)))
            pages += table
            row += count
        self._slots.append(torch.tensor(slots))
        self._chunks.append(torch.tensor(chunks))
        self._tables.append(torch.tensor(pages, dtype=torch.int32))

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        group = self.cache.group_of[layer]
        self.cache.write(layer, self._slots[group], k_TKD, v_TKD)
        pages_k, pages_v = self.cache.parts[layer]
        return ops.paged_attention(q_THD, pages_k, pages_v, self._chunks[group], self._tables[group], scale, reach)

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
        assert index is None  # see can_attend
        group = self.cache.group_of[layer]
        self.cache.write(layer, self._slots[group], torch.cat([latent_TC, k_rope_TR], -1))
        pages = self.cache.parts[layer][0][:, :, None]
        q_THC, up_value_HVC = query.absorb()
        q_THE, latent = torch.cat([q_THC, query.rope_THR], -1), q_THC.shape[-1]
        out_THC = ops.paged_attention(q_THE, pages, pages[..., :latent], self._chunks[group], self._tables[group], scale, reach)
        return ops.by_head(out_THC, up_value_HVC.transpose(1, 2))
