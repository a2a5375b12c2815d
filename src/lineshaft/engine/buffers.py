"""What a plan looks like to the native kernels: flat buffers at fixed places, filled anew in every step.

A recorded step (ops/recording.py) reads them where they were when it was recorded; they grow when a plan needs more, and
then it is recorded again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lineshaft.sched.plan import Plan


@dataclass(frozen=True)
class GroupBuffers:
    """Of one layer group."""

    slots_T: Tensor
    """int64: where each token's keys go, page * B + place in the page."""
    chunks_C4: Tensor
    """int64: first row, position of the first token, tokens, where the page numbers begin."""
    count_1: Tensor
    """int64: how many chunks there are."""
    tables: Tensor
    """int32: page numbers of all requests, one after another."""

    def fill(self, group: int, plan: Plan, page_tokens: int) -> None:
        """Lay a plan out."""
        slots, chunks, tables = self.slots_T.numpy(), self.chunks_C4.numpy(), self.tables.numpy()
        row = used = 0
        for place, chunk in enumerate(plan.chunks):
            pages, count = np.array(chunk.request.tables[group], dtype=np.int32), chunk.last - chunk.first
            positions = np.arange(chunk.first, chunk.last)
            slots[row : row + count] = pages[positions // page_tokens].astype(np.int64) * page_tokens + positions % page_tokens
            tables[used : used + len(pages)] = pages
            chunks[place] = row, chunk.first, count, used
            row, used = row + count, used + len(pages)
        self.count_1[0] = len(plan.chunks)


class StepBuffers:
    """Of a whole step: tokens, their positions, and where every group's keys are."""

    def __init__(self, groups: int, page_tokens: int, tokens: int) -> None:
        """`tokens`: of the largest step that is expected."""
        self.page_tokens, self._count = page_tokens, groups
        self._reserve(tokens, 16, 1024)

    def _reserve(self, tokens: int, chunks: int, pages: int) -> None:
        self.capacity, self._chunks, self._pages = tokens, chunks, pages
        self.tokens_T, self.positions_T = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))
        self.groups = [
            GroupBuffers(
                torch.zeros(tokens, dtype=torch.int64),
                torch.zeros(chunks, 4, dtype=torch.int64),
                torch.zeros(1, dtype=torch.int64),
                torch.zeros(pages, dtype=torch.int32),
            )
            for _ in range(self._count)
        ]

    def fill(self, plan: Plan) -> bool:
        """Lay a plan out. True when the buffers had to grow: whatever knew where they were must be told."""
        pages = max(sum(len(chunk.request.tables[group]) for chunk in plan.chunks) for group in range(self._count))
        wanted = ((self.capacity, plan.tokens), (self._chunks, len(plan.chunks)), (self._pages, pages))
        grown = any(need > have for have, need in wanted)
        if grown:
            self._reserve(*(have if need <= have else 2 * need for have, need in wanted))
        tokens, positions, row = self.tokens_T.numpy(), self.positions_T.numpy(), 0
        for chunk in plan.chunks:
            last = row + chunk.last - chunk.first
            tokens[row:last] = chunk.request.tokens[chunk.first : chunk.last]
            positions[row:last] = range(chunk.first, chunk.last)
            row = last
        for place, group in enumerate(self.groups):
            group.fill(place, plan, self.page_tokens)
        return grown
