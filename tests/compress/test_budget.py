"""Bits by budget: against every choice there is, against a table over all budgets, against HiGHS; and the curve."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.errors import ConfigError
from lineshaft.compress.budget import Allocation, Option, Options, allocate, frontier

UNIT = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=4)
"""Bytes, and damage in 64ths: sums of such are exact, so the oracle may ask for equality."""


def options_of(units: list[list[tuple[int, int]]]) -> Options:
    return {f"unit {n}": {f"format {k}": Option(size, harm / 64) for k, (size, harm) in enumerate(unit)} for n, unit in enumerate(units)}


def every_choice(options: Options) -> list[tuple[int, float]]:
    choices = itertools.product(*(formats.values() for formats in options.values()))
    return [(sum(option.bytes for option in choice), sum(option.damage for option in choice)) for choice in choices]


def told_truly(found: Allocation, options: Options) -> bool:
    chosen = [options[unit][name] for unit, name in found.formats.items()]
    sums = sum(option.bytes for option in chosen), pytest.approx(sum(option.damage for option in chosen), rel=1e-12)
    return list(found.formats) == list(options) and (found.bytes, found.damage) == sums


def best_by_table(options: Options, budget: int) -> float:
    """The textbook's way: least damage for every number of bytes, one unit after another (Kellerer et al., section 11.5)."""
    least = np.zeros(budget + 1)
    for formats in options.values():
        added = np.full(budget + 1, np.inf)
        for option in formats.values():
            if option.bytes <= budget:
                tail = least[: budget + 1 - option.bytes] + option.damage
                added[option.bytes :] = np.minimum(added[option.bytes :], tail)
        least = added
    return float(least[budget])


def model_like(units: int, seed: int, largest: int) -> Options:
    """Sizes of several kinds, damages over orders of magnitude, fewer bits hurting more, each a little by luck."""
    luck, made = random.Random(seed), {}
    for unit in range(units):
        size, weak = luck.randint(1, largest), 10 ** luck.uniform(-6, -2)
        formats = {"int8": (8, 1 / 256), "int4-128": (4, 1.6), "int4-32": (5, 1.0), "int4-32-zeros": (5, 0.8)}
        made[f"unit {unit}"] = {
            name: Option(bits * size + luck.randint(0, 2), weak * harm * luck.uniform(0.7, 1.4)) for name, (bits, harm) in formats.items()
        }
    return made


def budget_at(options: Options, share: float) -> int:
    """So far from the smallest to the largest size."""
    least, most = (sum(pick(option.bytes for option in formats.values()) for formats in options.values()) for pick in (min, max))
    return int(least + share * (most - least))


@settings(max_examples=150)
@given(st.lists(UNIT, min_size=1, max_size=6), st.integers(0, 250))
def test_it_finds_what_trying_every_choice_finds(units: list[list[tuple[int, int]]], budget: int) -> None:
    options = options_of(units)
    within = [choice for choice in every_choice(options) if choice[0] <= budget]
    if not within:
        with pytest.raises(ConfigError, match=f"a budget of {budget} bytes is too small"):
            allocate(options, budget)
        return
    found = allocate(options, budget)
    assert told_truly(found, options)
    assert (found.damage, found.bytes) == min((damage, size) for size, damage in within)


@pytest.mark.parametrize("seed", range(3))
def test_six_layers_of_four_formats_at_every_budget(seed: int) -> None:
    options = model_like(6, seed, 30)
    size_C, damage_C = np.array(every_choice(options)).T
    for budget in range(budget_at(options, 0), budget_at(options, 1) + 2, 3):
        assert allocate(options, budget).damage == pytest.approx(damage_C[size_C <= budget].min(), rel=1e-12)


@settings(max_examples=60)
@given(st.lists(UNIT, min_size=1, max_size=5))
def test_the_curve_is_what_no_choice_beats_and_falls(units: list[list[tuple[int, int]]]) -> None:
    options = options_of(units)
    choices = every_choice(options)
    best = {size: min(damage for other, damage in choices if other <= size) for size, _ in choices}
    corners = [(size, damage) for size, damage in sorted(best.items()) if all(best[other] > damage for other in best if other < size)]
    assert frontier(options) == corners
    assert [allocate(options, size).damage for size, _ in corners] == [damage for _, damage in corners]


@pytest.mark.parametrize("seed", range(4))
def test_three_hundred_units_are_solved_as_a_table_over_all_budgets_solves_them(seed: int) -> None:
    options = model_like(300, seed, 60)
    for share in (0.0, 0.02, 0.3, 0.31, 0.9, 1.0):
        budget = budget_at(options, share)
        found = allocate(options, budget)
        assert told_truly(found, options)
        assert found.bytes <= budget
        assert found.damage == pytest.approx(best_by_table(options, budget), rel=1e-12)


def test_highs_finds_no_better_choice() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here and not a dependency")
    for seed, share in itertools.product(range(3), (0.1, 0.5)):
        options = model_like(40, seed, 1000)
        budget = budget_at(options, share)
        flat = [option for formats in options.values() for option in formats.values()]
        one_each = np.kron(np.eye(len(options)), np.ones(4))
        limits = [
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(np.array([[option.bytes for option in flat]]), 0, budget),
        ]
        scale = 1e4  # its tolerances are absolute
        harm = np.array([option.damage for option in flat]) * scale
        solved = optimize.milp(harm, constraints=limits, integrality=np.ones(len(flat)), bounds=(0, 1), options={"mip_rel_gap": 0})
        assert solved.success
        assert allocate(options, budget).damage == pytest.approx(solved.fun / scale, rel=1e-6)


def test_units_that_are_all_alike_do_not_pile_up() -> None:
    """Of n alike some have the larger format: as many as fit."""
    options = {f"unit {n}": {"int8": Option(8, 0.0), "int4": Option(4, 1.0)} for n in range(400)}
    found = allocate(options, 4 * 400 + 4 * 123 + 3)
    assert (found.damage, found.bytes) == (400 - 123, 4 * 400 + 4 * 123)


def test_damages_of_any_size_and_sign_and_options_in_any_order() -> None:
    """Less than nothing is measured where rounding helps by luck. What is not needed is not spent."""
    options = {
        "a": {"int8": Option(10**12, -1e-12), "int4": Option(5 * 10**11, 3e-15)},
        "b": {"int4": Option(1, 1e-9), "dense": Option(4, 0.0), "int8": Option(2, 0.0)},
    }
    assert allocate(options, 2 * 10**12) == Allocation({"a": "int8", "b": "int8"}, 10**12 + 2, -1e-12)
    assert allocate(options, 5 * 10**11 + 1).formats == {"a": "int4", "b": "int4"}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="no unit"):
        allocate({}, 5)
    with pytest.raises(ConfigError, match="a: no format is offered"):
        frontier({"a": {}})
    for option in (Option(1, float("nan")), Option(1, float("inf")), Option(-1, 0.0)):
        with pytest.raises(ConfigError, match="a: int4 takes"):
            allocate({"a": {"int4": option}}, 5)
