"""The scheduler with a stand-in for the model: no torch, no clock. Every answer is what it would be alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sched_world import STOP, World

from lineshaft.base.config import load
from lineshaft.base.errors import CacheFull, ConfigError, QueueFull
from lineshaft.ops.reach import Blocks, Causal, Reach, Window
from lineshaft.sched.request import Sampling

REACHES = [Causal(), Window(window=3), Window(window=2, global_tokens=3), Blocks(block=2, local_blocks=2, stride=3)]


class AnyTraffic(RuleBasedStateMachine):
    """Submit, step, copy and cancel in any order, with any limits, often far too few pages, texts that begin alike."""

    @initialize(
        pages=st.integers(1, 10),
        page_tokens=st.integers(1, 4),
        reaches=st.lists(st.sampled_from(REACHES), min_size=1, max_size=2),
        max_batch=st.integers(1, 5),
        start_batch=st.integers(1, 5),
        step_tokens=st.integers(1, 12),
        max_waiting=st.integers(1, 6),
        prefix_cache=st.booleans(),
    )
    def open(self, pages: int, page_tokens: int, reaches: list[Reach], start_batch: int, **limits: int) -> None:
        self.world = World(pages, page_tokens, reaches, start_batch=min(start_batch, limits["max_batch"]), **limits)
        self.cancelled: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        stops=st.sampled_from([frozenset[int](), frozenset({STOP}), frozenset({1, 2, 3})]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        copies=st.sampled_from([1, 1, 2, 3]),
        task=st.sampled_from(["generate", "generate", "score", "embed"]),
    )
    def submit(self, prompt: list[int], max_tokens: int, copies: int, **how: object) -> None:
        world, scheduler = self.world, self.world.scheduler
        limits = scheduler.config
        needs = [group.most_pages(len(prompt) + max_tokens - 1, limits.step_tokens, world.page_tokens) for group in scheduler.groups]
        fits = max(needs) <= world.pool.pages
        room = not scheduler.waiting or len(scheduler.waiting) + copies <= limits.max_waiting
        before = list(scheduler.waiting)
        if fits and room:
            world.submit(prompt, max_tokens, copies=copies, **how)
            return
        with pytest.raises(QueueFull if fits else CacheFull):
            world.submit(prompt, max_tokens, copies=copies, **how)
        assert list(scheduler.waiting) == before

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.wanted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(1, len(self.world.wanted) + 1))  # ended and unknown numbers, too
        if number not in self.world.ends:
            self.cancelled.add(number)
        self.world.scheduler.cancel(number)

    @invariant()
    def pages_are_held_as_often_as_they_say(self) -> None:
        self.world.scheduler.check()

    @invariant()
    def answers_grow_as_they_would_alone(self) -> None:
        for number, answer in self.world.answers.items():
            assert answer == self.world.wanted[number][: len(answer)]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        # Each step gives some request a token or moves the first one on, and the first one stays first until it ends.
        world.run(2 * sum(request.limit for request in (*world.scheduler.running, *world.scheduler.waiting)))
        for number, wanted in world.wanted.items():
            if number not in self.cancelled:
                assert world.answers[number] == wanted
                assert world.ends[number] == ("stop" if not wanted or wanted[-1] in world.stops[number] else "length")


AnyTraffic.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


def test_a_request_that_gives_way_keeps_what_it_has_produced() -> None:
    world = World(pages=4, page_tokens=2)
    early, late = world.submit([1, 2, 3], max_tokens=6), world.submit([4, 5, 6], max_tokens=6)
    world.run()
    assert world.preempted
    assert world.answers == {early: world.wanted[early], late: world.wanted[late]}


def test_requests_end_in_order_of_arrival_when_pages_are_scarce() -> None:
    world = World(pages=4, page_tokens=2)
    for _ in range(4):
        world.submit([1, 2, 3, 4], max_tokens=5)
    world.run()
    assert list(world.ends) == [1, 2, 3, 4]


def test_a_request_that_gave_way_waits_until_all_its_tokens_fit_again() -> None:
    """Or it would come straight back, take the pages that the first one needs next, and be thrown out over and over."""
    world = World(pages=5, page_tokens=2, step_tokens=4)
    first, second = world.submit([1, 2], max_tokens=8), world.submit([3, 4], max_tokens=8)
    world.step()
    while world.scheduler.running[1:] or not world.scheduler.waiting:
        assert not world.ends
        world.step()
    (waits,) = world.scheduler.waiting
    assert waits.number == second
    while first not in world.ends:
        assert not [chunk for chunk in world.scheduler.plan().chunks if chunk.request is waits]
        world.step()
    world.run(8)
    assert world.preempted == 1


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    world = World(pages=50, page_tokens=4, step_tokens=5)
    short, long = world.submit([1], max_tokens=10), world.submit([2] * 30, max_tokens=2)
    world.step()
    for _ in range(6):
        assert [token.request for token in world.step()] == [short]
    assert {token.request for token in world.step()} == {short, long}


def test_more_requests_than_a_step_has_tokens_are_served_in_turn() -> None:
    world = World(pages=50, page_tokens=4, step_tokens=2)
    for _ in range(6):
        world.submit([1, 2], max_tokens=3)
    world.run(30)
    assert list(world.ends) == [1, 2, 3, 4, 5, 6]


def test_a_request_that_just_fits_runs_and_one_token_more_is_refused() -> None:
    world = World(pages=3, page_tokens=4)
    number = world.submit([1] * 5, max_tokens=8)  # the thirteenth token is the last: nothing looks back at it
    world.run()
    assert len(world.answers[number]) == 8
    with pytest.raises(CacheFull, match="needs 4 cache pages, the cache has 3: lower max_tokens"):
        world.submit([1] * 5, max_tokens=9)


def test_a_cancelled_request_frees_its_pages_at_once_and_the_others_do_not_notice() -> None:
    world = World(pages=20, page_tokens=2, max_batch=2)
    running, other, waiting = (world.submit([n] * 6, max_tokens=5) for n in (1, 2, 3))
    world.step()
    held = world.pool.held
    world.scheduler.cancel(running)
    assert held - world.pool.held == 3
    world.scheduler.cancel(waiting)
    world.run()
    assert list(world.ends) == [other]
    assert world.answers[other] == world.wanted[other]


def test_a_step_that_failed_can_be_planned_again() -> None:
    world = World(pages=4, page_tokens=2, step_tokens=3)
    for _ in range(3):
        world.submit([1, 2], max_tokens=4)
        world.scheduler.plan()  # what was planned never ran
        world.scheduler.check()
    world.run()
    assert world.answers == world.wanted


@pytest.mark.parametrize("bad", [{"top_p": 0.0}, {"temperature": float("inf")}, {"max_tokens": 0}, {"seed": 2**63}, {"top_k": -1}])
def test_sampling_that_means_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        load(Sampling, bad)


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, lineshaft.sched.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
