"""Texts that begin alike share pages: found by hash, counted, copied before they are written into, lost in order of use."""

from __future__ import annotations

import pytest
from sched_world import World

from lineshaft.ops.reach import Blocks, Causal, Window
from lineshaft.sched.groups import LayerGroup
from lineshaft.sched.request import GONE

BEGINNING = [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_later_request_takes_up_the_pages_of_an_earlier_one_that_began_alike() -> None:
    world = World(pages=20, page_tokens=4)
    world.submit([*BEGINNING, 9], max_tokens=2)
    world.run()
    before = world.computed
    second = world.submit([*BEGINNING, 3], max_tokens=2)
    world.run()
    assert world.computed - before == 2  # the last token of the prompt, and the first of the answer
    assert world.answers[second] == world.wanted[second]
    load = world.scheduler.load_now()
    assert (load.prefix_queried_tokens, load.prefix_hit_tokens) == (18, 8)


def test_the_whole_prompt_in_the_cache_leaves_its_last_page_to_be_run() -> None:
    world = World(pages=20, page_tokens=4)
    for _ in range(2):
        number = world.submit(BEGINNING, max_tokens=3)
        world.run()
        assert world.answers[number] == world.wanted[number]
    assert world.scheduler.load_now().prefix_hit_tokens == 4


def test_a_page_is_known_by_everything_before_it() -> None:
    world = World(pages=20, page_tokens=4)
    world.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    world.run()
    world.submit([4, 3, 2, 1, 5, 6, 7, 8, 9], max_tokens=1)  # the same second page behind another first one
    world.run()
    assert world.scheduler.load_now().prefix_hit_tokens == 0


def test_requests_that_run_together_share_what_the_first_has_finished() -> None:
    world = World(pages=20, page_tokens=2)
    first = world.submit(BEGINNING, max_tokens=8)
    world.step()
    second = world.submit(BEGINNING, max_tokens=8)
    world.step()
    one, two = (request.tables[0] for request in world.scheduler.running)
    assert one[:3] == two[:3]
    world.run()
    assert world.answers[first] == world.answers[second]


def test_what_was_used_least_lately_is_lost_first_and_of_a_text_the_end_before_the_beginning() -> None:
    world = World(pages=4, page_tokens=2)
    world.submit([1, 1, 1, 1, 1], max_tokens=1)  # two full pages
    world.run()
    world.submit([2, 2, 2], max_tokens=1)  # one more
    world.run()
    world.submit([3, 3, 3, 3], max_tokens=1)  # takes two: the free one, and one that is known
    world.run()
    hits = world.scheduler.load_now().prefix_hit_tokens
    world.submit([1, 1, 1, 1, 1], max_tokens=1)
    world.step()
    assert world.scheduler.load_now().prefix_hit_tokens - hits == 2  # its beginning alone
    world.run()


def test_a_request_that_gave_way_finds_its_own_beginning_again() -> None:
    world = World(pages=6, page_tokens=2)
    for first in (1, 2):
        world.submit([first] * 6, max_tokens=5)
    world.run()
    alone = sum(6 + 4 for _ in range(2))
    assert world.preempted
    assert world.computed - alone < 6 + 4  # less than it would cost to run one of them again


def test_without_a_prefix_cache_nothing_is_found() -> None:
    world = World(pages=20, page_tokens=4, prefix_cache=False)
    for _ in range(2):
        world.submit(BEGINNING, max_tokens=2)
        world.run()
    assert world.scheduler.load_now().prefix_hit_tokens == 0


@pytest.mark.parametrize("task", ["embed", "score"])
def test_who_needs_every_token_takes_nothing_from_the_cache(task: str) -> None:
    world = World(pages=20, page_tokens=4)
    for _ in range(2):
        world.submit([*BEGINNING, 9], max_tokens=1, task=task)
        world.run()
    assert world.computed == 2 * 9


@pytest.mark.parametrize("length", [8, 9, 11])
def test_copies_read_the_prompt_once_and_write_into_pages_of_their_own(length: int) -> None:
    world = World(pages=40, page_tokens=4)
    first = world.submit([3] * length, max_tokens=6, copies=3)
    world.step()
    assert world.computed == length
    assert len(world.scheduler.running) == 1  # the others wait for the prompt
    world.step()
    tables = [request.tables[0] for request in world.scheduler.running]
    shared = (length - 1) // 4
    assert all(table[:shared] == tables[0][:shared] for table in tables)
    assert len({table[shared] for table in tables}) == 3
    world.run()
    assert world.computed == length + 2 + 3 * 5  # the prompt, its last token for each copy, five tokens that are looked back at
    assert all(world.answers[first + copy] == world.wanted[first] for copy in range(3))


def test_a_copy_goes_on_alone_when_the_first_is_cancelled() -> None:
    for steps in (0, 1, 3):
        world = World(pages=40, page_tokens=4)
        first = world.submit([3] * 9, max_tokens=6, copies=2)
        for _ in range(steps):
            world.step()
        world.scheduler.cancel(first)
        world.run()
        assert world.answers[first + 1] == world.wanted[first + 1]


def test_a_windows_pages_come_free_behind_it_and_its_first_tokens_stay() -> None:
    world = World(pages=12, page_tokens=2, reaches=[Window(window=5, global_tokens=3)], step_tokens=8)
    number = world.submit([1] * 30, max_tokens=20)
    held = []
    while number not in world.ends:
        world.step()
        if world.scheduler.running:
            (table,) = world.scheduler.running[0].tables
            held.append(sum(page != GONE for page in table))
            assert GONE not in table[:2]
    assert max(held[1:]) <= 6  # of 25: two of the beginning, three or four of the window
    assert world.answers[number] == world.wanted[number]


def test_each_group_of_layers_frees_what_its_own_reach_lets_go() -> None:
    world = World(pages=40, page_tokens=2, reaches=[Causal(), Window(window=4)])
    world.submit([1] * 20, max_tokens=20)
    for _ in range(10):
        world.step()
    whole, near = world.scheduler.running[0].tables
    assert GONE not in whole
    assert near.count(GONE) >= len(near) - 4
    world.run()


def test_a_prefix_is_taken_up_where_the_window_still_has_what_it_looks_back_at() -> None:
    world = World(pages=40, page_tokens=2, reaches=[Window(window=4), Causal()])
    world.submit([*BEGINNING, *BEGINNING], max_tokens=2)
    world.run()
    second = world.submit([*BEGINNING, *BEGINNING, 1], max_tokens=2)
    world.run()
    assert world.scheduler.load_now().prefix_hit_tokens == 16
    assert world.answers[second] == world.wanted[second]


@pytest.mark.parametrize(
    ("reach", "position", "seen"),
    [
        (Causal(), 9, {0, 1, 2}),
        (Window(window=3), 9, {1, 2}),
        (Window(window=1), 8, {2}),
        (Window(window=2, global_tokens=5), 15, {0, 1, 3}),
        (Blocks(block=4, local_blocks=1, stride=2), 17, {0, 2, 4}),
    ],
)
def test_pages_that_may_still_be_seen(reach: object, position: int, seen: set[int]) -> None:
    assert LayerGroup(reach, (0,)).seen_pages(position, 4) == seen
