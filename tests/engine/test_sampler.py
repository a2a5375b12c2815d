"""Choosing tokens: against a slow oracle in float64, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lineshaft.engine.sampler import Sampler, truncated
from lineshaft.sched.request import Request, Sampling

EDGE = 1e-4
"""Float32 and float64 may disagree about a token that lies this near to a border."""

logits = st.lists(st.integers(-12, 12).map(lambda n: n / 3), min_size=1, max_size=20)  # many ties
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 25),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.51, 0.13]),
    min_p=st.sampled_from([0.0, 0.01, 0.17, 0.61, 1.0]),
)


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max())
    return power / power.sum()


def oracle(values: list[float], sampling: Sampling) -> tuple[np.ndarray, float]:
    """Probabilities, and how far the nearest decision was from going the other way."""
    x = np.array(values, np.float64) / sampling.temperature
    nearest = np.inf
    if sampling.top_k:
        kth = sorted(x, reverse=True)[: sampling.top_k][-1]
        x = np.where(x >= kth, x, -np.inf)
    chances = softmax(x)
    if sampling.top_p < 1:
        before = 0.0
        for token in sorted(range(len(x)), key=lambda token: (-chances[token], token)):
            nearest = min(nearest, abs(before - sampling.top_p))
            share, chances[token] = chances[token], chances[token] if before < sampling.top_p else 0.0
            before += share
    if sampling.min_p:
        floor = sampling.min_p * chances.max()
        nearest = min([nearest, *(abs(chance - floor) for chance in chances if 0 < chance < chances.max())])
        chances = np.where(chances >= floor, chances, 0.0)
    return chances / chances.sum(), nearest


@given(logits, samplings)
def test_truncation_is_that_of_the_oracle(values: list[float], sampling: Sampling) -> None:
    wanted, nearest = oracle(values, sampling)
    assume(nearest > EDGE)
    seen = truncated(torch.tensor(values), sampling).numpy()
    assert ((seen > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True), samplings)
def test_truncation_is_that_of_transformers_where_no_tokens_are_tied(values: list[float], sampling: Sampling) -> None:
    assume(np.diff(sorted(values)).min() > 1e-3)
    assume(oracle(values, sampling)[1] > EDGE)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    wanted = warpers(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([values]))[0].softmax(-1)
    torch.testing.assert_close(truncated(torch.tensor(values), sampling), wanted, rtol=1e-4, atol=1e-6)


def test_tokens_as_likely_as_the_last_of_the_top_k_stay_in() -> None:
    chances = truncated(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), Sampling(top_k=2))
    assert (chances > 0).tolist() == [False, True, True, True, False]
    assert chances[2] == chances[3]


def test_top_k_at_or_above_the_vocabulary_changes_nothing() -> None:
    values = torch.tensor([1.0, 3.0, 2.0])
    for top_k in (3, 4, 10**9):
        assert torch.equal(truncated(values, Sampling(top_k=top_k)), truncated(values, Sampling()))


def test_equally_likely_tokens_enter_top_p_in_the_order_of_their_ids() -> None:
    assert (truncated(torch.zeros(8), Sampling(top_p=0.3)) > 0).tolist() == [True] * 3 + [False] * 5


def test_top_p_stops_as_soon_as_it_is_reached() -> None:
    assert (truncated(torch.zeros(4), Sampling(top_p=0.5)) > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_the_coldest_temperature_takes_the_most_likely_token_and_never_breaks(temperature: float) -> None:
    values = torch.tensor([-40.0, 900.0, 899.0, -1e30])
    assert truncated(values, Sampling(temperature=temperature)).tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 5e-324])
def test_the_smallest_top_p_takes_the_most_likely_token(top_p: float) -> None:
    assert truncated(torch.tensor([0.0, 2.0, 1.0]), Sampling(top_p=top_p)).tolist() == [0.0, 1.0, 0.0]


def test_the_hottest_temperature_makes_all_tokens_equal() -> None:
    torch.testing.assert_close(truncated(torch.tensor([5.0, -5.0]), Sampling(temperature=1e300)), torch.tensor([0.5, 0.5]))


def test_tokens_come_as_often_as_their_probability_says() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, -1.0])
    request = Request(1, 1, Sampling(temperature=0.8, top_k=3, seed=4), frozenset(), [0])
    sampler, draws = Sampler(), 4000
    seen = np.bincount([sampler(values[None], [request])[0][0] for _ in range(draws)], minlength=4) / draws
    chances = truncated(values, request.sampling).numpy()
    assert seen[3] == 0
    assert (np.abs(seen - chances) < 4 * np.sqrt(chances * (1 - chances) / draws) + 1e-9).all()


def test_a_seed_restarts_with_each_request_and_belongs_to_it_alone() -> None:
    values = torch.zeros(2, 50)

    def draws(seeds: list[int | None]) -> list[list[int]]:
        sampler = Sampler()
        requests = [Request(number, 1, Sampling(seed=seed), frozenset(), [0]) for number, seed in enumerate(seeds)]
        return [list(row) for row in zip(*(sampler(values[: len(seeds)], requests)[0] for _ in range(8)), strict=True)]

    one, two = draws([3, -9])
    assert one == draws([3])[0]
    assert two == draws([-9])[0] != one
    assert draws([None]) != draws([None])
