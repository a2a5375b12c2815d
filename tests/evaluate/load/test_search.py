"""The search for the highest rate, against queues whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.evaluate.load.arrivals import Constant, Poisson
from lineshaft.evaluate.load.search import ProbeResult, SearchConfig, find_rate, interval

CONFIG = SearchConfig()
SHARE = 0.9


def queue(service, limit, arrivals, seconds):
    """A probe of one worker that serves in order (Lindley's recursion), the SLO being `limit` seconds in the system."""
    number = 0

    def probe(rate):
        nonlocal number
        number += 1
        chance = np.random.default_rng(number)
        free, good, count = 0.0, 0, 0
        at = [arrival.at for arrival in arrivals(rate=rate).arrivals(seconds, number)]
        for moment, work in zip(at, service(chance, len(at)), strict=True):
            free = max(free, moment) + work
            good += free - moment <= limit
            count += 1
        return ProbeResult(rate, good, count)

    return probe


def test_the_border_of_an_m_m_1_queue_is_found_within_three_percent():
    """Time in the system is exponential with rate mu - lambda, so lambda = mu - ln(1 / (1 - share)) / limit."""
    probe = queue(lambda chance, count: chance.exponential(0.1, count), 1.0, Poisson, 4000)
    found = find_rate(probe, 1.0, SHARE, CONFIG)
    assert found.limit == "slo"
    assert found.rate == pytest.approx(10 - math.log(10) / 1.0, rel=0.03)


def in_m_d_1(rate, work, limit):
    """Chance that the time in the system stays below `limit` (Erlang 1909): Poisson arrivals, constant work."""
    load, wait = rate * work, limit - work
    terms = range(int(wait / work) + 1)
    return (1 - load) * math.fsum((rate * (k * work - wait)) ** k / math.factorial(k) * math.exp(-rate * (k * work - wait)) for k in terms)


def test_the_border_of_an_m_d_1_queue_is_found_within_three_percent():
    rates = np.linspace(5, 9.99, 5000)
    analytic = max(rate for rate in rates if in_m_d_1(rate, 0.1, 0.6) >= SHARE)
    found = find_rate(queue(lambda _, count: [0.1] * count, 0.6, Poisson, 4000), 1.0, SHARE, CONFIG)
    assert found.rate == pytest.approx(analytic, rel=0.03)


def test_the_border_of_a_deterministic_queue_is_its_service_rate():
    found = find_rate(queue(lambda _, count: [0.1] * count, 0.3, Constant, 600), 0.7, SHARE, CONFIG)
    assert found.rate == pytest.approx(10, rel=0.03)
    assert found.rate < found.failing <= found.rate * 1.02


@given(st.floats(0.01, 900), st.floats(0.01, 900))
def test_a_sharp_border_is_found_within_the_tolerance_from_anywhere_within_reach(start, border):
    found = find_rate(lambda rate: ProbeResult(rate, 1000 * (rate <= border), 1000), start, 0.99, CONFIG)
    assert found.limit == "slo"
    assert border / 1.02 <= found.rate <= border
    assert len(found.probes) <= CONFIG.probes


@given(st.integers(0, 1 << 30))
def test_chance_near_the_border_moves_the_answer_little(seed):
    """The share of good requests falls from 1 to 0 around 50 requests a second; each probe sees 400 of them."""
    chance = np.random.default_rng(seed)

    def probe(rate):
        return ProbeResult(rate, int(chance.binomial(400, 1 / (1 + (rate / 60) ** 12))), 400)

    analytic = 60 * (1 / SHARE - 1) ** (1 / 12)
    assert find_rate(probe, 10.0, SHARE, CONFIG).rate == pytest.approx(analytic, rel=0.08)


def test_an_answer_that_a_second_probe_overturns_is_lowered():
    seen = []

    def probe(rate):
        seen.append(rate)
        lucky = len(seen) == 3  # the first rate above the border that is below the first failure
        return ProbeResult(rate, 1000 if rate <= 10 or lucky else 0, 1000)

    found = find_rate(probe, 8.0, 0.6, CONFIG)
    assert 10 / 1.02 <= found.rate <= 10


def test_what_stops_a_search_is_named():
    fine = lambda rate: ProbeResult(rate, 1000, 1000)  # noqa: E731
    assert find_rate(fine, 1.0, 0.9, SearchConfig(highest=5.0)).limit == "highest"
    assert find_rate(fine, 1.0, 0.9, SearchConfig(highest=5.0)).rate == 5.0
    assert find_rate(fine, 1.0, 0.9, SearchConfig(probes=2)).limit == "probes"
    never = find_rate(lambda rate: ProbeResult(rate, 0, 1000), 1.0, 0.9, CONFIG)
    assert (never.limit, never.rate, never.failing) == ("lowest", None, CONFIG.lowest)
    assert find_rate(fine, 1.0, 0.9, SearchConfig(lowest=3.0, highest=5.0)).probes[0].rate == 3.0
    slow = find_rate(lambda rate: ProbeResult(rate, 1000, 1000, keeps_up=rate < 6), 1.0, 0.9, CONFIG)
    assert (slow.limit, slow.rate, slow.failing) == ("client", 4.0, None)
    stopped = find_rate(lambda rate: ProbeResult(rate, 1000, 1000, interrupted=rate > 2), 1.0, 0.9, CONFIG)
    assert (stopped.limit, stopped.rate) == ("interrupted", 2.0)


def test_one_hiccup_of_the_client_does_not_end_a_search():
    rates = []

    def probe(rate):
        rates.append(rate)
        return ProbeResult(rate, 1000 * (rate <= 10), 1000, keeps_up=len(rates) != 3)

    assert find_rate(probe, 1.0, 0.9, CONFIG).limit == "slo"
    assert rates[2] == rates[3]


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_narrows_with_more_requests(seen):
    good, requests = seen
    low, high = interval(good, requests)
    assert low + 1e-12 >= 0 and low - 1e-12 <= good / requests <= high + 1e-12 and high <= 1 + 1e-12
    wide = interval(good * 4, requests * 4)
    assert wide[1] - wide[0] < high - low
