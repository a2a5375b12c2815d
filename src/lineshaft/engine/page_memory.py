"""The memory of the paged cache, whatever lies in it. Free of torch: a kept start (starts/) works with it as it is."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from lineshaft.base.pages import HUGE, huge, touch
from lineshaft.sched.groups import LayerGroup

FIRST = 1 << 30
"""Bytes of the pages that are used first, to be ready before tokens come (`PageMemory.get_ready`)."""

CACHE_SHARE = 0.5
"""Of the memory that is left beside weights and activations, where no size was asked for: the rest is for what other programs and the
files' own cache need."""


class PageMemory:
    """`memory[layer]` holds the bytes of a layer's parts, keys and values for example: pages of B tokens, one after another.

    `pages`: P of each layer group. The page behind the last is never written into: all zero, it stands for what is not there.
    """

    def __init__(self, groups: Sequence[LayerGroup], pages: Sequence[int], page_tokens: int, token_bytes: Sequence[int]) -> None:
        """`token_bytes`: of a token in each part of a layer. Memory is taken where it is touched: writing gigabytes of zeros would be
        most of a server's start."""
        self.groups, self.pages, self.page_tokens, self.token_bytes = list(groups), list(pages), page_tokens, list(token_bytes)
        self.group_of = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        self.memory = [
            [huge((pages[self.group_of[layer]] + 1) * page_tokens * size) for size in token_bytes] for layer in sorted(self.group_of)
        ]

    @property
    def size(self) -> int:
        """Bytes of all pages."""
        layers = (count + 1 for count, group in zip(self.pages, self.groups, strict=True) for _ in group.layers)
        return sum(layers) * self.page_tokens * sum(self.token_bytes)

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy a page in all layers of a group."""
        for layer in self.groups[group].layers:
            for memory, size in zip(self.memory[layer], self.token_bytes, strict=True):
                page = self.page_tokens * size
                memory[target * page : (target + 1) * page] = memory[source * page : (source + 1) * page]

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
        parts: list[mmap.mmap] = [memory for layer in self.memory for memory in layer]
        for memory in parts:
            touch(memory, FIRST // len(parts) // HUGE * HUGE)
