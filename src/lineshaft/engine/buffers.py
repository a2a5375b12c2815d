"""What a plan looks like to the native kernels: flat buffers at fixed places, filled anew in every step.

A recorded step (ops/recording.py) reads them where they were when it was recorded, so they are as large as a plan can be. Numbers go in
through memory views: what works on arrays takes longer than the few numbers of a step in which every request gets a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lineshaft.sched.plan import Chunk, Plan

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]


class GroupBuffers:
    """Of one layer group."""

    def __init__(self, tokens: int, chunks: int, pages: int) -> None:
        self.slots_T = np.zeros(tokens, np.int64)
        """Where each token's keys go, page * B + place in the page."""
        self.chunks_C4 = np.zeros((chunks, 4), np.int64)
        """First row, position of the first token, tokens, where the page numbers begin."""
        self.count_1 = np.zeros(1, np.int64)
        """How many chunks there are."""
        self.tables = np.zeros(pages, np.int32)
        """Page numbers of all requests, one after another."""
        self._slots, self._chunks = _view(self.slots_T), _view(self.chunks_C4)
        self._count, self._tables = _view(self.count_1), _view(self.tables)
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

    def __init__(self, groups: int, page_tokens: int, tokens: int, requests: int, context_tokens: int) -> None:
        """`tokens`, `requests`: most of one plan, of `context_tokens` each at most. What is never filled takes no memory."""
        self.page_tokens, self.capacity, self.most_rows = page_tokens, tokens, requests
        self.tokens = self.rows = 0
        """Of the plan that was laid out last: tokens, and rows that get logits."""
        self.tokens_T, self.positions_T = (np.zeros(tokens, np.int64) for _ in range(2))
        self.rows_R = np.zeros(requests, np.int64)
        self._ids, self._positions, self._rows = map(_view, (self.tokens_T, self.positions_T, self.rows_R))
        pages = requests * -(-context_tokens // page_tokens)
        self.groups = [GroupBuffers(tokens, requests, pages) for _ in range(groups)]

    def fill(self, plan: Plan) -> None:
        """Lay a plan out. ValueError for one that is larger than all that were expected."""
        if plan.tokens > self.capacity or len(plan.chunks) > self.most_rows:
            raise ValueError(f"{plan.tokens} tokens of {len(plan.chunks)} requests in buffers for {self.capacity} of {self.most_rows}")
        self.tokens, row = plan.tokens, 0
        for chunk in plan.chunks:
            first, last, ids = chunk.first, chunk.last, chunk.request.tokens
            begun, row = row, row + last - first
            self._ids[begun:row] = array("q", ids[first:last])
            self._positions[begun:row] = array("q", range(first, last))
        for place, group in enumerate(self.groups):
            group.fill(place, plan.chunks, self.page_tokens)
        self.choose(plan.sampling_rows)

    def choose(self, rows: Sequence[int]) -> None:
        """These rows of the plan get logits."""
        self._rows[: len(rows)] = array("q", rows)
        self.rows = len(rows)

    def named(self) -> dict[str, Numbers]:
        """All of them, in an order that hangs on nothing but the number of groups."""
        own: dict[str, Numbers] = {"tokens": self.tokens_T, "positions": self.positions_T, "rows": self.rows_R}
        for place, group in enumerate(self.groups):
            parts: dict[str, Numbers] = {"slots": group.slots_T, "chunks": group.chunks_C4, "count": group.count_1, "tables": group.tables}
            own |= {f"{name} of group {place}": part for name, part in parts.items()}
        return own


def _view(numbers: Numbers) -> memoryview:
    """Of numbers in a row; an array of the same type code can be put in."""
    return numbers.reshape(-1).data.cast("B").cast("q" if numbers.dtype == np.int64 else "i")
