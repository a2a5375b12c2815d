"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.cost import kv_width


class PagedCache:
    """`parts[layer]` holds one tensor [P, B, ...] for latents, or two (keys, values): P pages of B tokens."""

    def __init__(self, config: ModelConfig, pages: int, page_tokens: int, dtype: torch.dtype) -> None:
        self.pages, self.page_tokens, self.dtype = pages, page_tokens, dtype
        a = config.attention
        shapes = [(a.num_key_value_heads, a.head_dim)] * 2 if isinstance(a, GroupedQueryAttention) else [(kv_width(config),)]
        self.parts = [[torch.zeros(pages, page_tokens, *shape, dtype=dtype) for shape in shapes] for _ in range(config.num_hidden_layers)]

    def write(self, layer: int, slots_T: Tensor, *entries: Tensor) -> None:
        """Put each token's entry into its slot (page * B + place in the page)."""
        for part, entry in zip(self.parts[layer], entries, strict=True):
            part.flatten(0, 1)[slots_T] = entry.to(self.dtype)


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return config.num_hidden_layers * page_tokens * kv_width(config) * dtype.itemsize
