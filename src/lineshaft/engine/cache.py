"""The paged cache: what earlier tokens leave behind for later ones, in pages of a fixed number of tokens.

Grouped-query attention leaves keys and values; latent attention leaves one latent and one rotated key, shared by all heads,
and with an indexer one index key. Layers that see alike form a group with pages of its own (sched/groups.py).
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lineshaft.base.pages import HUGE, huge, touch
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import kv_bytes, kv_entries
from lineshaft.ops import table as ops
from lineshaft.ops.entries import entry_bytes
from lineshaft.sched.groups import LayerGroup, layer_groups

FIRST = 1 << 30
"""Bytes of the pages that are used first, to be ready before tokens come (`PagedCache.get_ready`)."""


class PagedCache:
    """`parts[layer]` holds tensors [P + 1, B, ...], P pages of B tokens: keys and values, or latents, or latents and index keys.

    `dtype`: of the entries; int8: they are coded (ops/entries.py), and their tensors bytes. `pages`: P of each layer group. The page
    behind the last is never written into: all zero, it stands for what is not there.
    """

    def __init__(self, config: ModelConfig, pages: Sequence[int], page_tokens: int, dtype: torch.dtype) -> None:
        self.config, self.groups, self.pages, self.page_tokens, self.dtype = config, groups_of(config), list(pages), page_tokens, dtype
        self.group_of = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        self.coded = dtype == torch.int8
        self._memory: list[mmap.mmap] = []
        self.parts = [
            [self._zeros((pages[self.group_of[layer]] + 1, page_tokens, *shape)) for shape in self._shapes()]
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

    def get_ready(self) -> threading.Thread:
        """A thread, after which all others go, that has the system give memory for the pages that are used first.

        Else the first tokens in each page wait for it, which was a fifth of the time that a prompt took in a virtual machine.
        """
        thread = threading.Thread(target=self._touch, name="cache memory", daemon=True)
        thread.start()
        return thread

    def _touch(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # a sandbox may forbid it: then it takes its turn with the others
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for memory in self._memory:
            touch(memory, FIRST // len(self._memory) // HUGE * HUGE)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros that take memory only where they are touched: writing gigabytes of them would be most of a server's start."""
        dtype = torch.uint8 if self.coded else self.dtype
        size = dtype.itemsize * math.prod(shape)
        self._memory.append(huge(size))
        return torch.frombuffer(self._memory[-1], dtype=dtype, count=size // dtype.itemsize).view(shape)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(*heads, entry_bytes(width) if self.coded else width) for *heads, width in kv_entries(self.config)]


def groups_of(config: ModelConfig) -> list[LayerGroup]:
    """The layer groups of a model."""
    return layer_groups([config.reach_of(layer) for layer in range(config.num_hidden_layers)])


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of one page over so many layers (None: all). `dtype` as in PagedCache."""
    return (config.num_hidden_layers if layers is None else layers) * page_tokens * kv_bytes(config, str(dtype).removeprefix("torch."))
