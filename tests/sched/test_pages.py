"""The page pool."""

from __future__ import annotations

import pytest

from lineshaft.sched.pages import PagePool


def test_pages_come_back_and_the_warm_ones_are_handed_out_first() -> None:
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([1])
    assert pool.take(1) == [1]
    assert pool.free == 1
    pool.check()


def test_a_page_given_back_twice_is_a_mistake_that_shows() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(KeyError):
        pool.give_back(pages)


def test_more_pages_than_there_are_can_not_be_taken() -> None:
    with pytest.raises(AssertionError):
        PagePool(2).take(3)
