"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads,
and with an indexer one index key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.cost import kv_width


class PagedCache:
    """`parts[layer]` holds tensors [P, B, ...], P pages of B tokens: keys and values, or latents, or latents and index keys."""

    def __init__(self, config: ModelConfig, pages: int, page_tokens: int, dtype: torch.dtype) -> None:
        self.pages, self.page_tokens, self.dtype = pages, page_tokens, dtype
        shapes = _entry_shapes(config)
        self.parts = [[torch.zeros(pages, page_tokens, *shape, dtype=dtype) for shape in shapes] for _ in range(config.num_hidden_layers)]

    def write(self, layer: int, slots_T: Tensor, *entries: Tensor) -> None:
        """Put each token's entry into its slot (page * B + place in the page)."""
        for part, entry in zip(self.parts[layer], entries, strict=True):
            part.flatten(0, 1)[slots_T] = entry.to(self.dtype)


def _entry_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """What one token leaves in one layer."""
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return [(a.num_key_value_heads, a.head_dim)] * 2
    return [(a.kv_lora_rank + a.qk_rope_head_dim,), *([(a.indexer.head_dim,)] if a.indexer else [])]


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return config.num_hidden_layers * page_tokens * kv_width(config) * dtype.itemsize
