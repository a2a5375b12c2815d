"""Paired statistics: against scipy's numbers, written down here, and against simulated models whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base.errors import ConfigError
from lineshaft.evaluate.statistics import Comparison, Interval, compare, mcnemar, student_quantile

RUNS, ROWS = 400, 60
AMOUNTS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(1, 500)), min_size=2, max_size=30)


def rows(generator: np.random.Generator, rise: float, noise: float = 0.05, count: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(old, new, tokens) of documents of uneven length and difficulty, on which both differ more the longer they are."""
    tokens = np.ceil(generator.lognormal(4, 0.6, count))
    old = tokens * generator.normal(2.5, 0.4, count)
    return old, old * (1 + rise + generator.normal(0, noise, count)), tokens


def found(rise: float, margin: float = 0.0, seed: int = 0, resamples: int = 400) -> dict[str, list[str]]:
    """The verdict of each interval in each run."""
    generator = np.random.default_rng(seed)
    compared = [compare(*rows(generator, rise), resamples=resamples, seed=run) for run in range(RUNS)]
    return {name: [getattr(one, name).verdict(margin) for one in compared] for name in ("difference", "rise", "resampled")}


def most(share: float, runs: int = RUNS) -> float:
    """What a share seen in so many runs stays below, but for one time in a thousand."""
    return share + 3.1 * math.sqrt(share * (1 - share) / runs)


# -- simulated models -------------------------------------------------------------------------------------------------


def test_equal_models_are_told_apart_in_one_run_of_twenty() -> None:
    for told in found(rise=0).values():
        differences = sum(verdict != "no difference seen" for verdict in told) / RUNS
        assert differences <= most(0.05)


def test_a_rise_of_five_percent_is_found() -> None:
    for told in found(rise=0.05).values():
        assert told.count("worse") >= 0.99 * RUNS
        assert told.count("better") == 0


def test_a_fall_of_five_percent_is_found() -> None:
    assert found(rise=-0.05)["rise"].count("better") >= 0.99 * RUNS


def test_a_slowdown_of_five_percent_is_found_among_noisy_requests() -> None:
    """Times of a request differ by 15 % from run to run."""
    generator = np.random.default_rng(3)
    verdicts = [compare(*rows(generator, 0.05, noise=0.15, count=200), resamples=40).rise.verdict() for _ in range(RUNS)]
    assert verdicts.count("worse") >= 0.9 * RUNS


def test_a_rise_as_large_as_the_margin_is_rarely_called_worse() -> None:
    assert found(rise=0.02, margin=0.02)["rise"].count("worse") / RUNS <= most(0.025)
    assert found(rise=-0.02, margin=0.02)["rise"].count("better") / RUNS <= most(0.025)


def test_intervals_hold_the_truth_in_93_to_97_percent_of_runs() -> None:
    generator, runs, truth = np.random.default_rng(5), 2000, 0.03
    held = {"difference": 0, "rise": 0, "resampled": 0}
    for run in range(runs):
        one = compare(*rows(generator, truth), resamples=400, seed=run)
        for name in held:
            interval: Interval = getattr(one, name)
            held[name] += interval.low <= truth * (1 if name == "rise" else 2.5) <= interval.high
    assert all(0.93 * runs <= count <= 0.97 * runs for count in held.values()), held


# -- numbers of scipy 1.17 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "chance", "quantile"),
    [
        (1, 0.975, 12.706204736174694),
        (2, 0.975, 4.302652729749462),
        (3, 0.995, 5.840909309733355),
        (7, 0.975, 2.364624251592784),
        (10, 0.9, 1.372183641110336),
        (29, 0.975, 2.045229642132703),
        (30, 0.995, 2.7499956535672254),
        (127, 0.975, 1.9788195347028539),
        (400, 0.975, 1.9659123432294627),
        (9999, 0.9995, 3.291500063300963),
    ],
)
def test_quantiles_of_student_are_those_of_scipy(freedom: int, chance: float, quantile: float) -> None:
    assert student_quantile(chance, freedom) == pytest.approx(quantile, rel=1e-10)
    assert student_quantile(1 - chance, freedom) == pytest.approx(-quantile, rel=1e-10)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 0.0625),
        (7, 7, 1.0),
        (3, 12, 0.03515625),
        (10, 25, 0.016673847800120715),
        (400, 480, 0.007707305043339153),
        (5000, 5400, 9.116949314541157e-05),
    ],
)
def test_mcnemar_is_scipys_binomial_test_of_the_rows_that_differ(lost: int, won: int, p: float) -> None:
    old, new = [True] * lost + [False] * won + [True, False] * 50, [False] * lost + [True] * won + [True, False] * 50
    assert mcnemar(old, new) == pytest.approx(p, rel=1e-9)
    assert mcnemar(new, old) == pytest.approx(p, rel=1e-9)


def five_rows(weight: list[float]) -> Comparison:
    return compare([2.0, 3.0, 5.0, 4.0, 7.0], [2.5, 3.1, 5.9, 4.0, 7.2], weight)


def test_with_equal_weights_it_is_the_paired_t_test() -> None:
    """scipy.stats.ttest_rel(new, old).confidence_interval()."""
    interval = five_rows([1.0] * 5).difference
    assert (interval.low, interval.high) == pytest.approx((-0.11282449296598629, 0.7928244929659866), rel=1e-10)


def test_longer_rows_weigh_more() -> None:
    """By hand: sum of differences 1.7, tokens 20; the residual of a row is what it differs beyond its tokens' share."""
    interval = five_rows([1.0, 2.0, 3.0, 4.0, 10.0]).difference
    residuals = [more - 1.7 / 20 * n for more, n in zip([0.5, 0.1, 0.9, 0.0, 0.2], [1, 2, 3, 4, 10], strict=True)]
    half = 2.7764451051977987 * math.sqrt(5 / 4 * sum(r * r for r in residuals)) / 20
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.085, 0.085 - half, 0.085 + half), rel=1e-10)


# -- what must hold always --------------------------------------------------------------------------------------------


@given(AMOUNTS)
def test_who_is_compared_with_whom_turns_the_sign_only(amounts: list[tuple[float, float, int]]) -> None:
    old, new, tokens = (np.array(item) for item in zip(*amounts, strict=True))
    one, other = compare(old, new, tokens, resamples=40), compare(new, old, tokens, resamples=40)
    for name in ("difference", "resampled"):
        there, back = getattr(one, name), getattr(other, name)
        assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low), rel=1e-6, abs=1e-9)


@given(AMOUNTS, st.integers(0, 100))
def test_a_model_is_no_different_from_itself(amounts: list[tuple[float, float, int]], seed: int) -> None:
    old, _, tokens = (np.array(item) for item in zip(*amounts, strict=True))
    one = compare(old, old, tokens, resamples=40, seed=seed)
    for interval in (one.difference, one.rise, one.resampled):
        assert (interval.estimate, interval.low, interval.high, interval.verdict()) == (0, 0, 0, "no difference seen")


@given(AMOUNTS)
def test_a_rise_of_the_same_size_for_every_token_leaves_no_doubt(amounts: list[tuple[float, float, int]]) -> None:
    """However uneven the rows: their weights are resampled with them."""
    old, _, tokens = (np.array(item) for item in zip(*amounts, strict=True))
    one = compare(old, old + 0.25 * tokens, tokens, resamples=40)
    for interval in (one.difference, one.resampled):
        assert (interval.low, interval.estimate, interval.high) == pytest.approx((0.25, 0.25, 0.25), rel=1e-6)
        assert interval.verdict(margin=0.2) == "worse"


def test_the_same_seed_gives_the_same_interval_and_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(np.random.default_rng(0), 0.01)
    one, other = compare(*data, seed=1), compare(*data, seed=2)
    monkeypatch.setattr("lineshaft.evaluate.statistics._AT_ONCE", 7 * ROWS)
    assert compare(*data, seed=1) == one
    assert other.resampled != one.resampled
    assert other.difference == one.difference


def test_a_verdict_takes_the_whole_interval_beyond_the_margin() -> None:
    interval = Interval(0.04, 0.03, 0.05, 0.05)
    assert [interval.verdict(margin) for margin in (0.0, 0.029, 0.03, 0.06)] == ["worse", "worse", *["no difference seen"] * 2]
    assert Interval(-0.04, -0.05, -0.03, 0.05).verdict(0.029) == "better"
    assert Interval(0.0, -0.01, 0.01, 0.05).verdict() == "no difference seen"


def test_what_can_not_be_compared_is_refused() -> None:
    for old, new, weight, told in [
        ([1.0], [1.0], [1.0], "two rows or more"),
        ([1.0, 2.0], [1.0], [1.0, 1.0], r"\[2\] and \[1\] and \[2\]"),
        ([1.0, math.nan], [1.0, 1.0], [1.0, 1.0], "not a number or infinite"),
        ([1.0, 2.0], [1.0, 1.0], [1.0, 0.0], "row 1 has no weight"),
        ([0.0, 0.0], [1.0, 1.0], [1.0, 1.0], "costs nothing"),
    ]:
        with pytest.raises(ConfigError, match=told):
            compare(old, new, weight)
    with pytest.raises(ConfigError, match="take 40"):
        compare([1.0, 2.0], [1.0, 1.0], [1.0, 1.0], resamples=39)
    for error in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="not a share between 0 and 1"):
            compare([1.0, 2.0], [1.0, 1.0], [1.0, 1.0], error=error)
    with pytest.raises(ConfigError, match="the same rows of each"):
        mcnemar([True], [True, False])
    for chance, freedom in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ConfigError, match="no quantile"):
            student_quantile(chance, freedom)
