"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads,
and with an indexer one index key. Layers that see alike form a group with pages of its own (sched/groups.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lineshaft.engine.page_memory import PageMemory
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import kv_bytes, kv_entries
from lineshaft.ops import table as ops
from lineshaft.ops.entries import entry_bytes
from lineshaft.sched.groups import LayerGroup, layer_groups


class PagedCache(PageMemory):
    """`parts[layer]` holds tensors [P + 1, B, ...], P pages of B tokens: keys and values, or latents, or latents and index keys.

    `dtype`: of the entries; int8: they are coded (ops/entries.py), and their tensors bytes.
    """

    def __init__(self, config: ModelConfig, pages: Sequence[int], page_tokens: int, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.coded = config, dtype, dtype == torch.int8
        shapes, item = self._shapes(), torch.uint8 if self.coded else dtype
        super().__init__(groups_of(config), pages, page_tokens, [item.itemsize * math.prod(shape) for shape in shapes])
        self.parts = [
            [
                torch.frombuffer(memory, dtype=item, count=count * page_tokens * math.prod(shape)).view(count, page_tokens, *shape)
                for memory, shape in zip(self.memory[layer], shapes, strict=True)
            ]
            for layer in range(config.num_hidden_layers)
            for count in [pages[self.group_of[layer]] + 1]
        ]

    def write(self, layer: int, slots_T: Tensor, *entries: Tensor) -> None:
        """Put each token's entry into its slot (page * B + place in the page)."""
        for part, entry in zip(self.parts[layer], entries, strict=True):
            if self.coded:
                ops.write_codes(part, slots_T, entry)
            else:
                ops.write_pages(part, slots_T, entry.to(self.dtype))

    def empty_slot(self, group: int) -> int:
        """A slot that holds zeros."""
        return self.pages[group] * self.page_tokens

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(*heads, entry_bytes(width) if self.coded else width) for *heads, width in kv_entries(self.config)]


def groups_of(config: ModelConfig) -> list[LayerGroup]:
    """The layer groups of a model."""
    return layer_groups([config.reach_of(layer) for layer in range(config.num_hidden_layers)])


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of one page over so many layers (None: all). `dtype` as in PagedCache."""
    return (config.num_hidden_layers if layers is None else layers) * page_tokens * kv_bytes(config, str(dtype).removeprefix("torch."))
