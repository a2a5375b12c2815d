"""Attention over the paged cache by the native kernel: all requests of a step in one call, each number as if it were alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lineshaft.engine.buffers import GroupBuffers, StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.cost import kv_entries
from lineshaft.ops import table as ops
from lineshaft.ops.checks import WIDEST
from lineshaft.ops.isa import describe, library
from lineshaft.ops.reach import Causal, Reach


def obstacle(config: ModelConfig) -> str | None:
    """Why the kernel can't be used, or None: it is not there, or can't do what this model asks for."""
    a = config.attention
    if library() is None:
        return describe().removeprefix("warning: ")
    widths = [math.prod(entry) for entry in kv_entries(config)] if isinstance(a, LatentAttention) else [a.head_dim]
    unfit = [width for width in widths if width % 2 or width > WIDEST]
    return f"the native kernels attend to keys of an even number of channels, at most {WIDEST}, not {unfit[0]}" if unfit else None


class _Laid(NamedTuple):
    """GroupBuffers, as kernels take them."""

    slots_T: Tensor
    chunks_C4: Tensor
    count_1: Tensor
    tables: Tensor

    @classmethod
    def of(cls, group: GroupBuffers) -> _Laid:
        return cls(*map(torch.from_numpy, (group.slots_T, group.chunks_C4, group.count_1, group.tables)))


class NativeAttend:
    """Implements model.attend.Attend for what the buffers hold: writes the new keys first, then lets each request look at its own pages."""

    def __init__(self, cache: PagedCache, buffers: StepBuffers, tokens: int) -> None:
        """`tokens`: rows that the model runs."""
        self.cache, self._groups, self._tokens = cache, [_Laid.of(group) for group in buffers.groups], tokens

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        group = self._groups[self.cache.group_of[layer]]
        self.cache.write(layer, group.slots_T[: self._tokens], k_TKD, v_TKD)
        pages_k, pages_v = self.cache.parts[layer]
        return self._attended(q_THD, pages_k, pages_v, q_THD.shape[-1], group, scale, reach)

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
        group, latent = self._groups[self.cache.group_of[layer]], latent_TC.shape[-1]
        entries = [ops.join(latent_TC, k_rope_TR), *([] if index is None else [index.key_TD])]
        self.cache.write(layer, group.slots_T[: self._tokens], *entries)
        pages, *index_pages = self.cache.parts[layer]
        q_THE = ops.join(query.absorbed(), query.rope_THR)
        if index is None:
            return query.values(self._attended(q_THE, pages[:, :, None], pages[:, :, None], latent, group, scale, reach))
        slots_TK, chunks_T4, count_1 = self._chosen(index, index_pages[0], group, reach)
        single = pages.view(-1, 1, 1, pages.shape[-1])  # each token a page of its own
        return query.values(
            ops.paged_attention(q_THE, single, single[..., :latent], chunks_T4, slots_TK.flatten(), scale, Causal(), count_1)
        )

    def _chosen(self, index: IndexQuery, pages: Tensor, group: _Laid, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        longest = self.cache.config.max_position_embeddings
        where = group.chunks_C4, group.tables, index.top_k, reach, longest, group.count_1
        return ops.choose_keys(index.q_TJD, index.weight_TJ, pages, *where)

    def _attended(
        self, q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, values: int, group: _Laid, scale: float, reach: Reach
    ) -> Tensor:
        """`values`: channels of an entry of `pages_v` that are its value."""
        where = group.chunks_C4, group.tables, scale, reach, group.count_1
        if self.cache.coded:
            return ops.coded_attention(q_THD, pages_k, pages_v, values, *where)
        return ops.paged_attention(q_THD, pages_k, pages_v[..., :values], *where)
