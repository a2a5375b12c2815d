"""The page pool."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lineshaft.sched.pages import PagePool


def test_pages_come_back_and_the_warm_ones_are_handed_out_first() -> None:
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([1])
    assert pool.take(1) == [1]
    assert pool.available == 1
    pool.check([0, 1, 2])


def test_a_page_given_back_twice_is_a_mistake_that_shows() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(AssertionError):
        pool.give_back(pages)


def test_more_pages_than_there_are_can_not_be_taken() -> None:
    with pytest.raises(AssertionError):
        PagePool(2).take(3)


def test_a_shared_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.share(page)
    assert not pool.writable(page)
    pool.give_back([page])
    assert pool.writable(page)
    assert pool.available == 1
    pool.give_back([page])
    assert pool.available == 2


def test_a_known_page_is_found_until_it_is_needed() -> None:
    pool = PagePool(1)
    pool.publish(*pool.take(1), b"text")
    pool.give_back([0])
    assert pool.find(b"text") == 0
    assert pool.available == 1
    assert pool.take(1) == [0]
    assert pool.find(b"text") is None


class AnyHolders(RuleBasedStateMachine):
    """Take, share, publish, find and give back in any order, beside a plain list of who holds what."""

    @initialize(pages=st.integers(1, 6))
    def open(self, pages: int) -> None:
        self.pool = PagePool(pages)
        self.held: list[int] = []
        self.keys = 0

    @rule(count=st.integers(0, 3))
    def take(self, count: int) -> None:
        if count <= self.pool.available:
            taken = self.pool.take(count)
            assert not set(taken) & set(self.held)
            self.held += taken

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.pool.share(page)
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        if self.pool.writable(page):
            self.keys += 1
            self.pool.publish(page, bytes([self.keys % 250]))

    @rule(key=st.integers(0, 12))
    def take_up(self, key: int) -> None:
        page = self.pool.find(bytes([key]))
        if page is not None:
            before, idle = self.pool.available, self.pool.is_idle(page)
            self.pool.share(page)
            self.held.append(page)
            assert self.pool.available == before - idle

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        page = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.give_back([page])

    @invariant()
    def every_page_is_free_idle_or_held(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.held)
            assert self.pool.held == len(set(self.held))


AnyHolders.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHolders = AnyHolders.TestCase
