"""Attention over the paged cache by the native kernel: all requests of a step in one call, each number as if it were alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lineshaft.engine.buffers import GroupBuffers, StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.model.config import GroupedQueryAttention, LatentAttention, ModelConfig
from lineshaft.ops import table as ops
from lineshaft.ops.checks import WIDEST
from lineshaft.ops.isa import describe, library
from lineshaft.ops.reach import Reach


def obstacle(config: ModelConfig) -> str | None:
    """Why the kernel can't be used, or None: it is not there, or can't do what this model asks for."""
    a = config.attention
    if library() is None:
        return describe().removeprefix("warning: ")
    if isinstance(a, LatentAttention) and a.indexer is not None:
        return "the native kernels can't choose among keys, as this model's indexer does"
    width = a.head_dim if isinstance(a, GroupedQueryAttention) else a.kv_lora_rank + a.qk_rope_head_dim
    fits = width % 2 == 0 and width <= WIDEST
    return None if fits else f"the native kernels attend to keys of an even number of channels, at most {WIDEST}, not {width}"


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
        assert index is None  # see obstacle
        group = self._groups[self.cache.group_of[layer]]
        self.cache.write(layer, group.slots_T[: self._tokens], ops.join(latent_TC, k_rope_TR))
        pages = self.cache.parts[layer][0][:, :, None]
        q_THE, latent = ops.join(query.absorbed(), query.rope_THR), latent_TC.shape[-1]
        return query.values(self._attended(q_THE, pages, pages, latent, group, scale, reach))

    def _attended(
        self, q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, values: int, group: _Laid, scale: float, reach: Reach
    ) -> Tensor:
        """`values`: channels of an entry of `pages_v` that are its value."""
        where = group.chunks_C4, group.tables, scale, reach, group.count_1
        if self.cache.coded:
            return ops.coded_attention(q_THD, pages_k, pages_v, values, *where)
        return ops.paged_attention(q_THD, pages_k, pages_v[..., :values], *where)
