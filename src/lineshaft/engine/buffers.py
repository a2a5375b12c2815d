"""What a plan looks like to the native kernels: flat buffers at fixed places, filled anew in every step.

A recorded step (ops/recording.py) reads them where they were when it was recorded; they grow when a plan needs more, and
then it is recorded again. Numbers go in through memory views: what works on arrays takes longer than the few numbers of a
step in which every request gets a token.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from lineshaft.sched.plan import Chunk, Plan


class GroupBuffers:
    """Of one layer group."""

    def __init__(self, tokens: int, chunks: int, pages: int) -> None:
        self.slots_T = torch.zeros(tokens, dtype=torch.int64)
        """Where each token's keys go, page * B + place in the page."""
        self.chunks_C4 = torch.zeros(chunks, 4, dtype=torch.int64)
        """First row, position of the first token, tokens, where the page numbers begin."""
        self.count_1 = torch.zeros(1, dtype=torch.int64)
        """How many chunks there are."""
        self.tables = torch.zeros(pages, dtype=torch.int32)
        """Page numbers of all requests, one after another."""
        self._slots, self._chunks, self._count, self._tables = map(_view, (self.slots_T, self.chunks_C4, self.count_1, self.tables))
        self._laid: list[tuple[list[int], int]] = []
        """The table that lies at each chunk's place, and where it begins."""

    def fill(self, group: int, chunks: list[Chunk], page_tokens: int) -> None:
        """Lay a plan's chunks out."""
        row = used = 0
        for place, chunk in enumerate(chunks):
            table, first, last = chunk.request.tables[group], chunk.first, chunk.last
            self._lay(place, table, used, first // page_tokens)
            count = last - first
            slots = [table[position // page_tokens] * page_tokens + position % page_tokens for position in range(first, last)]
            self._slots[row : row + count] = array("q", slots)
            self._chunks[4 * place : 4 * place + 4] = array("q", (row, first, count, used))
            row, used = row + count, used + len(table)
        self._count[0] = len(chunks)

    def _lay(self, place: int, table: list[int], used: int, changed: int) -> None:
        """Page numbers from `used` on. Where the step before put the same table, those before `changed` stay: none of them is another
        page by now (some may be given back, and nobody looks at them)."""
        same = place < len(self._laid) and self._laid[place][0] is table and self._laid[place][1] == used
        if not same:
            del self._laid[place:]  # the others may have been written over
            self._laid.append((table, used))
        first = changed if same else 0
        self._tables[used + first : used + len(table)] = array("i", table[first:])


class StepBuffers:
    """Of a whole step: tokens, their positions, where every group's keys are, and which rows get logits."""

    def __init__(self, groups: int, page_tokens: int, tokens: int, requests: int) -> None:
        """`tokens`: of the largest step that is expected; `requests`: most of one plan."""
        self.page_tokens, self._count, self._requests = page_tokens, groups, requests
        self.tokens = self.rows = 0
        """Of the plan that was laid out last: tokens, and rows that get logits."""
        self._reserve(tokens, min(16, requests), 1024)

    def _reserve(self, tokens: int, chunks: int, pages: int) -> None:
        self.capacity, self.most_rows, self._pages = tokens, chunks, pages
        self.tokens_T, self.positions_T = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))
        self.rows_R = torch.zeros(chunks, dtype=torch.int64)
        self._ids, self._positions, self._rows = map(_view, (self.tokens_T, self.positions_T, self.rows_R))
        self.groups = [GroupBuffers(tokens, chunks, pages) for _ in range(self._count)]

    def fill(self, plan: Plan) -> bool:
        """Lay a plan out. True when the buffers had to grow: whatever knew where they were must be told."""
        self.tokens, self.rows = plan.tokens, 0
        grown = self._grow(plan.chunks)
        row = 0
        for chunk in plan.chunks:
            first, last, ids = chunk.first, chunk.last, chunk.request.tokens
            begun, row = row, row + last - first
            self._ids[begun:row] = array("q", ids[first:last])
            self._positions[begun:row] = array("q", range(first, last))
            if chunk.samples:
                self._rows[self.rows] = row - 1
                self.rows += 1
        for place, group in enumerate(self.groups):
            group.fill(place, plan.chunks, self.page_tokens)
        return grown

    def _grow(self, chunks: list[Chunk]) -> bool:
        pages = max([sum([len(chunk.request.tables[group]) for chunk in chunks]) for group in range(self._count)])
        if self.tokens <= self.capacity and len(chunks) <= self.most_rows and pages <= self._pages:
            return False
        wanted = ((self.capacity, self.tokens), (self.most_rows, len(chunks)), (self._pages, pages))
        tokens, rows, places = (have if need <= have else 2 * need for have, need in wanted)
        self._reserve(tokens, min(rows, self._requests), places)  # each row holds as many logits as there are words
        return True


def _view(tensor: Tensor) -> memoryview:
    """Of its numbers, in a row; an array of the same type code can be put in."""
    return tensor.view(-1).numpy().data.cast("B").cast("q" if tensor.dtype == torch.int64 else "i")
