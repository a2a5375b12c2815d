"""Priorities, and how many are worked on at once."""

from __future__ import annotations

import pytest
from sched_world import World

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.sched.admission import PRESETS, Admission, SchedulerConfig


def test_a_better_priority_is_served_first() -> None:
    world = World(pages=50, page_tokens=4, max_batch=1)
    running = world.submit([1, 2], max_tokens=3)
    world.step()
    low, high = world.submit([3], max_tokens=2, priority=5), world.submit([4], max_tokens=2, priority=0)
    world.run()
    assert list(world.ends) == [running, high, low]


def test_a_better_priority_takes_the_place_of_a_worse_one_and_both_answer_as_alone() -> None:
    world = World(pages=50, page_tokens=4, max_batch=1)
    low = world.submit([1, 2], max_tokens=9, priority=1)
    world.step()
    high = world.submit([3], max_tokens=2)
    world.run()
    assert list(world.ends) == [high, low]
    assert world.preempted == 1
    assert world.answers == world.wanted


def test_a_better_priority_takes_the_pages_of_a_worse_one() -> None:
    world = World(pages=4, page_tokens=2)
    low = world.submit([1, 2, 3], max_tokens=5, priority=1)
    world.step()
    high = world.submit([4] * 5, max_tokens=2)
    world.run()
    assert list(world.ends) == [high, low]
    assert world.answers == world.wanted


def test_equal_priorities_never_throw_each_other_out_of_a_full_batch() -> None:
    world = World(pages=50, page_tokens=4, max_batch=1)
    for first in range(4):
        world.submit([first], max_tokens=4)
    world.run()
    assert list(world.ends) == [1, 2, 3, 4]
    assert not world.preempted


def test_it_begins_with_eight_grows_while_more_than_three_wait_and_stops_at_64() -> None:
    admission = Admission(SchedulerConfig())
    assert admission.update(8, 3, 0.0) == 8
    assert [admission.update(8, 4, 0.0) for _ in range(5)] == [16, 32, 64, 64, 64]


def test_it_comes_down_again_when_nobody_waits_and_half_the_places_are_empty() -> None:
    admission = Admission(SchedulerConfig())
    for _ in range(3):
        admission.update(8, 9, 0.0)
    assert [admission.update(running, 0, 0.0) for running in (40, 32, 32, 16, 8, 1, 0)] == [64, 32, 32, 16, 8, 8, 8]


def test_who_has_waited_50_milliseconds_comes_in_whatever_the_limit_says_but_not_beyond_the_cap() -> None:
    admission = Admission(SchedulerConfig())
    assert admission.update(8, 2, 0.049) == 8
    assert admission.update(8, 2, 0.050) == 10
    assert Admission(SchedulerConfig(max_batch=9)).update(8, 2, 1.0) == 9


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_is_not_said(preset: str) -> None:
    config = load(SchedulerConfig, {"preset": preset, "step_tokens": 77})
    assert config.step_tokens == 77
    assert {name: getattr(config, name) for name in PRESETS[preset] if name != "step_tokens"} == {
        name: value for name, value in PRESETS[preset].items() if name != "step_tokens"
    }


def test_presets_keep_the_caps_of_32_and_64() -> None:
    assert {preset: load(SchedulerConfig, {"preset": preset}).max_batch for preset in PRESETS} == {
        "latency": 32,
        "balanced": 64,
        "throughput": 64,
    }


@pytest.mark.parametrize(
    ("table", "told"),
    [({"preset": "fast"}, "preset"), ({"start_batch": 9, "max_batch": 8}, "start_batch 9 must not be more"), ({"cap": 1}, "cap")],
)
def test_settings_that_mean_nothing_are_refused(table: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(SchedulerConfig, table)


def test_a_small_cap_lowers_the_start() -> None:
    assert SchedulerConfig(max_batch=3).start_batch == 3
