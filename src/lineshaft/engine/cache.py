"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads,
and with an indexer one index key. Layers that see alike form a group with pages of its own (sched/groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lineshaft.base.pages import huge
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.cost import kv_width
from lineshaft.ops import table as ops
from lineshaft.sched.groups import LayerGroup, layer_groups


class PagedCache:
    """`parts[layer]` holds tensors [P + 1, B, ...], P pages of B tokens: keys and values, or latents, or latents and index keys.

    `pages`: P of each layer group. The page behind the last is never written into: all zero, it stands for what is not there.
    """

    def __init__(self, config: ModelConfig, pages: Sequence[int], page_tokens: int, dtype: torch.dtype) -> None:
        self.config, self.groups, self.pages, self.page_tokens, self.dtype = config, groups_of(config), list(pages), page_tokens, dtype
        self.group_of = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        shapes = _entry_shapes(config)
        self.parts = [
            [_zeros((pages[self.group_of[layer]] + 1, page_tokens, *shape), dtype) for shape in shapes]
            for layer in range(config.num_hidden_layers)
        ]

    def write(self, layer: int, slots_T: Tensor, *entries: Tensor) -> None:
        """Put each token's entry into its slot (page * B + place in the page)."""
        for part, entry in zip(self.parts[layer], entries, strict=True):
            ops.write_pages(part, slots_T, entry.to(self.dtype))

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy a page in all layers of a group."""
        for layer in self.groups[group].layers:
            for part in self.parts[layer]:
                part[target] = part[source]

    def empty_slot(self, group: int) -> int:
        """A slot that holds zeros."""
        return self.pages[group] * self.page_tokens


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched: writing gigabytes of them would be most of a server's start."""
    size = dtype.itemsize
    for side in shape:
        size *= side
    return torch.frombuffer(huge(size), dtype=dtype, count=size // dtype.itemsize).view(shape)


def groups_of(config: ModelConfig) -> list[LayerGroup]:
    """The layer groups of a model."""
    return layer_groups([config.reach_of(layer) for layer in range(config.num_hidden_layers)])


def _entry_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """What one token leaves in one layer."""
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return [(a.num_key_value_heads, a.head_dim)] * 2
    return [(a.kv_lora_rank + a.qk_rope_head_dim,), *([(a.indexer.head_dim,)] if a.indexer else [])]


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of one page over so many layers (None: all)."""
    return (config.num_hidden_layers if layers is None else layers) * page_tokens * kv_width(config) * dtype.itemsize
