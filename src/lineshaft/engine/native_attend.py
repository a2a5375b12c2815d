"""Attention over the paged cache by the native kernel: all requests of a step in one call, each number as if it were alone."""

from __future__ import annotations

from torch import Tensor

from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.ops import table as ops
from lineshaft.ops.checks import WIDEST
from lineshaft.ops.isa import library
from lineshaft.ops.reach import Reach


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
    """Implements model.attend.Attend for what the buffers hold: writes the new keys first, then lets each request look at its own pages."""

    def __init__(self, cache: PagedCache, buffers: StepBuffers, tokens: int) -> None:
        """`tokens`: rows that the model runs."""
        self.cache, self._groups, self._tokens = cache, buffers.groups, tokens

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        group = self._groups[self.cache.group_of[layer]]
        self.cache.write(layer, group.slots_T[: self._tokens], k_TKD, v_TKD)
        pages_k, pages_v = self.cache.parts[layer]
        return ops.paged_attention(q_THD, pages_k, pages_v, group.chunks_C4, group.tables, scale, reach, group.count_1)

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
        group = self._groups[self.cache.group_of[layer]]
        self.cache.write(layer, group.slots_T[: self._tokens], ops.join(latent_TC, k_rope_TR))
        pages = self.cache.parts[layer][0][:, :, None]
        q_THE, latent = ops.join(query.absorbed(), query.rope_THR), latent_TC.shape[-1]
        out_THC = ops.paged_attention(q_THE, pages, pages[..., :latent], group.chunks_C4, group.tables, scale, reach, group.count_1)
        return query.values(out_THC)
