"""When requests arrive."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lineshaft.base.errors import ConfigError
from lineshaft.evaluate.load.arrivals import Constant, Poisson, Ramp, Trace

rates, times, seeds = st.floats(0.1, 200), st.floats(0.5, 60), st.integers(0, 1 << 40)
shares = st.tuples(st.floats(0, 0.3), st.floats(0, 0.4))


@given(rates, times)
def test_constant_arrivals_are_evenly_spaced_and_fill_the_time(rate, seconds):
    at = [arrival.at for arrival in Constant(rate=rate).arrivals(seconds, 0)]
    assert at[0] == 0
    assert np.allclose(np.diff(at), 1 / rate)
    assert at[-1] < seconds <= at[-1] + 1.000001 / rate


@given(st.sampled_from(["poisson", "ramp"]), rates, times, seeds)
@settings(max_examples=25)
def test_random_arrivals_ascend_within_the_time_and_repeat_with_their_seed(kind, rate, seconds, seed):
    config = Poisson(rate=rate) if kind == "poisson" else Ramp(rate=rate)
    at = [arrival.at for arrival in config.arrivals(seconds, seed)]
    assert at == sorted(at)
    assert all(0 <= moment < seconds for moment in at)
    assert at == [arrival.at for arrival in config.arrivals(seconds, seed)]
    assert len(at) < 5 or at != [arrival.at for arrival in config.arrivals(seconds, seed + 1)]


@given(seeds)
@settings(max_examples=30)
def test_poisson_counts_and_gaps_are_those_of_the_rate(seed):
    at = [arrival.at for arrival in Poisson(rate=50).arrivals(100, seed)]
    assert len(at) == pytest.approx(5000, abs=6 * 5000**0.5)
    gaps = np.diff(at)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.15)  # of an exponential the two are equal


@given(rates, st.floats(1.1, 10), shares, times)
def test_a_ramps_expected_count_is_the_area_below_its_rate(rate, factor, parts, seconds):
    ramp = Ramp(rate=rate, factor=factor, climb_share=parts[0], peak_share=parts[1])
    knots = ramp.knots(seconds)
    assert [at for at, _ in knots] == sorted(at for at, _ in knots)
    assert ramp.expected(seconds) == pytest.approx(np.trapezoid([rate for _, rate in knots], [at for at, _ in knots]))


@given(st.floats(1, 20), st.floats(5, 8), shares, seeds)
@settings(max_examples=30)
def test_a_ramps_arrivals_fall_where_the_area_below_its_rate_reaches_those_of_a_steady_rate(rate, factor, parts, seed):
    ramp = Ramp(rate=rate, factor=factor, climb_share=parts[0], peak_share=parts[1])
    steady = [arrival.at for arrival in Poisson(rate=1.0).arrivals(ramp.expected(30), seed)]
    fine = np.linspace(0, 30, 60_001)
    height = np.interp(fine, *zip(*ramp.knots(30), strict=True))
    area = np.concatenate([[0], np.cumsum((height[1:] + height[:-1]) / 2 * np.diff(fine))])
    found = [arrival.at for arrival in ramp.arrivals(30, seed)]
    assert np.interp(found, fine, area) == pytest.approx(np.array(steady[: len(found)]), abs=rate * factor * 0.001)
    assert len(steady) - len(found) <= 1


@given(seeds, st.floats(5, 8))
@settings(max_examples=15)
def test_each_part_of_a_ramp_gets_its_share_of_arrivals(seed, factor):
    ramp = Ramp(rate=20, factor=factor)
    at = np.array([arrival.at for arrival in ramp.arrivals(100, seed)])
    for begin, end, wanted in ((0, 25, 20 * 25), (25, 35, 20 * (1 + factor) / 2 * 10), (35, 65, 20 * factor * 30), (75, 100, 20 * 25)):
        assert np.sum((at >= begin) & (at < end)) == pytest.approx(wanted, abs=6 * wanted**0.5)


def test_a_jump_is_a_ramp_without_a_climb():
    at = np.array([arrival.at for arrival in Ramp(rate=10, factor=8, climb_share=0, peak_share=0.5).arrivals(100, 3)])
    assert np.sum((at >= 25) & (at < 75)) == pytest.approx(4000, abs=400)


@pytest.mark.parametrize("bad", [{"rate": 0}, {"rate": -1}, {"rate": float("nan")}, {"climb_share": 0.5, "peak_share": 0.5}, {"factor": 1}])
def test_an_impossible_ramp_is_refused(bad):
    with pytest.raises(ValidationError):
        Ramp(**bad)


def test_a_trace_is_replayed_from_its_first_line_on(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [{"at": 100.0, "prompt_tokens": 5, "max_tokens": 2}, {"at": 102.0, "prompt": "hello", "user": "x"}, {"at": 110}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = Trace(path=str(path), speed=2.0).arrivals(5, 0)
    assert [(line.at, line.prompt_tokens, line.max_tokens, line.prompt) for line in found] == [(0, 5, 2, None), (1, None, None, "hello")]
    assert Trace(path=str(path)).expected(60) == 3
    assert Trace(path=str(path), speed=2.0).span() == pytest.approx(5 * 3 / 2)
    path.write_text('{"at": 7}\n')
    assert Trace(path=str(path)).span() == 1.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"at": 1}\n{"at": 2', "line 2: not JSON"),
        ('{"at": 1}\n\n{"at": 0.5}', 'line 3: "at" is 0.5, before the line above'),
        ('{"at": -1}', 'line 1: "at": '),
        ('{"prompt_tokens": 3}', 'line 1: "at": Field required'),
        ('{"at": 1, "max_tokens": 0}', 'line 1: "max_tokens"'),
        ("[1]", "line 1: Input should be a valid dictionary"),
        ("\n", "holds no request"),
    ],
)
def test_a_broken_trace_is_refused_with_the_number_of_its_line(tmp_path, text, told):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"trace\.jsonl") as caught:
        Trace(path=str(path)).arrivals(60, 0)
    assert told in str(caught.value)


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        Trace(path=str(tmp_path / "none")).arrivals(60, 0)
