"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads,
and with an indexer one index key. Layers that see alike form a group with pages of its own (sched/groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lineshaft.base.pages import huge
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import kv_bytes, kv_entries
from lineshaft.ops import table as ops
from lineshaft.ops.entries import entry_bytes
from lineshaft.sched.groups import LayerGroup, layer_groups


class PagedCache:
    """`parts[layer]` holds tensors [P + 1, B, ...], P pages of B tokens: keys and values, or latents, or latents and index keys.

    `dtype`: of the entries; int8: they are coded (ops/entries.py), and their tensors bytes. `pages`: P of each layer group. The page
    behind the last is never written into: all zero, it stands for what is not there.
    """

    def __init__(self, config: ModelConfig, pages: Sequence[int], page_tokens: int, dtype: torch.dtype) -> None:
        self.config, self.groups, self.pages, self.page_tokens, self.dtype = config, groups_of(config), list(pages), page_tokens, dtype
        self.group_of = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        self.coded = dtype == torch.int8
        self.parts = [
            [
                _zeros((pages[self.group_of[layer]] + 1, page_tokens, *shape), torch.uint8 if self.coded else dtype)
                for shape in self._shapes()
            ]
            for layer in range(config.num_hidden_layers)
        ]

    def write(self, layer: int, slots_T: Tensor, *entries: Tensor) -> None:
        """Put each token's entry into its slot (page * B + place in the page)."""
        for part, entry in zip(self.parts[layer], entries, strict=True):
            if self.coded:
                ops.write_codes(part, slots_T, entry)
            else:
                ops.write_pages(part, slots_T, entry.to(self.dtype))

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy a page in all layers of a group."""
        for layer in self.groups[group].layers:
            for part in self.parts[layer]:
                part[target] = part[source]

    def empty_slot(self, group: int) -> int:
        """A slot that holds zeros."""
        return self.pages[group] * self.page_tokens

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(*heads, entry_bytes(width) if self.coded else width) for *heads, width in kv_entries(self.config)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched: writing gigabytes of them would be most of a server's start."""
    size = dtype.itemsize
    for side in shape:
        size *= side
    return torch.frombuffer(huge(size), dtype=dtype, count=size // dtype.itemsize).view(shape)


def groups_of(config: ModelConfig) -> list[LayerGroup]:
    """The layer groups of a model."""
    return layer_groups([config.reach_of(layer) for layer in range(config.num_hidden_layers)])


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of one page over so many layers (None: all). `dtype` as in PagedCache."""
    return (config.num_hidden_layers if layers is None else layers) * page_tokens * kv_bytes(config, str(dtype).removeprefix("torch."))
