"""What the kernels find in a step's buffers, whatever was laid out there before: a plan's tokens, slots, pages and rows for logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_world import World

from lineshaft.engine.buffers import StepBuffers
from lineshaft.ops.reach import Causal, Reach, Window
from lineshaft.sched.plan import Chunk, Plan
from lineshaft.sched.request import Request, Sampling

PAGE = 2
REACHES = [Causal(), Window(window=3)]


class Watched(World):
    """Lays every plan out in the same buffers, and reads it back."""

    def __init__(self, pages: int, reaches: Sequence[Reach], **limits: object) -> None:
        super().__init__(pages, PAGE, reaches, **limits)
        self.buffers = StepBuffers(len(self.pools), PAGE, 9, 5, 40)

    def _check_plan(self, plan: Plan) -> None:
        super()._check_plan(plan)
        self.buffers.fill(plan)
        tokens = [(chunk.request.tokens[place], place) for chunk in plan.chunks for place in range(chunk.first, chunk.last)]
        assert list(zip(self.buffers.tokens_T.tolist(), self.buffers.positions_T.tolist(), strict=True))[: plan.tokens] == tokens
        assert (self.buffers.tokens, self.buffers.rows) == (plan.tokens, len(plan.sampling))
        assert self.buffers.rows_R[: self.buffers.rows].tolist() == plan.sampling_rows
        for group, reach in enumerate(self.reaches):
            self._check_group(plan, group, reach)

    def _check_group(self, plan: Plan, group: int, reach: Reach) -> None:
        """Every page that a token of the plan sees or writes into is where the kernel looks for it."""
        laid, row = self.buffers.groups[group], 0
        assert laid.count_1.item() == len(plan.chunks)
        for chunk, (first_row, first, count, at) in zip(plan.chunks, laid.chunks_C4.tolist(), strict=False):
            assert (first_row, first, count) == (row, chunk.first, chunk.last - chunk.first)
            for position in range(chunk.first, chunk.last):
                assert laid.slots_T[row].item() == self._slot(chunk.request, group, position)
                row += 1
                seen = {place // PAGE for place in range(position + 1) if reach.visible(position, place)}
                assert all(laid.tables[at + page].item() == chunk.request.tables[group][page] for page in seen)


Asked = tuple[list[int], int, int, int, str, int]
ASKS = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(1, 12),
    st.sampled_from([0, 0, 0, -1]),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from(["generate", "generate", "score", "embed"]),
    st.integers(0, 6),
)
"""Prompt, tokens to make, priority, copies, task, and the steps before the next one comes."""


@settings(max_examples=50)  # each holds dozens of plans
@given(st.lists(ASKS, min_size=1, max_size=12), st.integers(16, 40), st.lists(st.sampled_from(REACHES), min_size=1, max_size=2))
def test_buffers_hold_each_plan_after_any_others(asks: list[Asked], pages: int, reaches: list[Reach]) -> None:
    world = Watched(pages, reaches, start_batch=3, max_batch=5, step_tokens=9)
    for prompt, most, priority, copies, task, steps in asks:
        world.submit(prompt, most, priority=priority, copies=copies, task=task)
        for _ in range(steps):
            world.step()
    world.run()


def holding(pages: list[int]) -> Request:
    """A request whose next token goes into the last of these pages."""
    tokens = PAGE * len(pages)
    return Request(1, tokens, Sampling(), frozenset(), list(range(tokens)), tables=[pages])


def next_of(requests: Sequence[Request]) -> Plan:
    """The last token of each."""
    return Plan([Chunk(request, len(request.tokens) - 1, len(request.tokens)) for request in requests])


def test_a_request_that_was_written_over_is_laid_out_again() -> None:
    buffers, one, two, wide = StepBuffers(1, PAGE, 4, 50, 6), holding([11]), holding([21, 22]), holding([31, 32, 33])
    for requests, wanted in (([one, two], [11, 21, 22]), ([wide], [31, 32, 33]), ([one, two], [11, 21, 22])):
        buffers.fill(next_of(requests))
        assert buffers.groups[0].tables[: len(wanted)].tolist() == wanted


def test_a_plan_larger_than_all_that_were_expected_is_refused() -> None:
    buffers, requests = StepBuffers(1, PAGE, 4, 3, 6), [holding([number]) for number in range(5)]
    buffers.fill(next_of(requests[:3]))
    with pytest.raises(ValueError, match="4 tokens of 4 requests in buffers for 4 of 3"):
        buffers.fill(next_of(requests[:4]))
    with pytest.raises(ValueError, match="6 tokens of 1 requests in buffers for 4 of 3"):
        buffers.fill(Plan([Chunk(holding([1, 2, 3]), 0, 6)]))
    assert buffers.rows_R.tolist() == [0, 1, 2]
