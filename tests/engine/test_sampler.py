"""Tokens for requests: how often, by whose seed, and with logits left as they were. The rules themselves: tests/ops/test_sampling.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lineshaft.engine.runner import drawn
from lineshaft.engine.sampler import Sampler
from lineshaft.ops import isa
from lineshaft.ops.sampling import truncated
from lineshaft.sched.request import Request, Sampling


def test_tokens_come_as_often_as_their_probability_says() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, -1.0])
    request = Request(1, 1, Sampling(temperature=0.8, top_k=3, seed=4), frozenset(), [0])
    sampler, draws = Sampler(drawn), 4000
    seen = np.bincount([sampler(values[None].numpy(), [request])[0][0] for _ in range(draws)], minlength=4) / draws
    chances = truncated(values, 0.8, 3, 1.0, 0.0).numpy()
    assert seen[3] == 0
    assert (np.abs(seen - chances) < 4 * np.sqrt(chances * (1 - chances) / draws) + 1e-9).all()


def test_a_seed_restarts_with_each_request_and_belongs_to_it_alone() -> None:
    values = torch.zeros(2, 50)

    def draws(seeds: list[int | None]) -> list[list[int]]:
        sampler = Sampler(drawn)
        requests = [Request(number, 1, Sampling(seed=seed), frozenset(), [0]) for number, seed in enumerate(seeds)]
        return [list(row) for row in zip(*(sampler(values[: len(seeds)].numpy(), requests)[0] for _ in range(8)), strict=True)]

    one, two = draws([3, -9])
    assert one == draws([3])[0]
    assert two == draws([-9])[0] != one
    assert draws([None]) != draws([None])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_penalties_choose_the_token_and_scores_tell_what_the_model_said(temperature: float) -> None:
    logits = torch.tensor([[3.0, 2.5, 0.0, -1.0], [3.0, 2.5, 0.0, -1.0]])
    plain = Request(1, 1, Sampling(temperature=temperature, logprobs=1, top_k=1), frozenset(), [0])
    biased = Request(2, 1, plain.sampling.model_copy(update={"logit_bias": {0: -5.0}, "frequency_penalty": 1.0}), frozenset(), [0, 1])
    before = logits.clone()
    tokens, scores = Sampler(drawn)(logits.numpy(), [plain, biased])
    assert tokens == [0, 1]
    assert torch.equal(logits, before)
    assert scores is not None
    assert [score.logprob for score in scores if score] == pytest.approx(before[0].log_softmax(-1)[:2].tolist())
    assert all(score is not None and score.top[0][0] == 0 for score in scores)


@pytest.mark.skipif(isa.library() is None, reason="no native kernels here")
def test_with_and_without_native_kernels_a_seed_chooses_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    requests = [Request(number, 1, Sampling(temperature=0.9, top_p=0.8, top_k=30, seed=number), frozenset(), [0]) for number in range(40)]
    found = Sampler(drawn)(values.numpy(), requests)[0]
    monkeypatch.setattr(isa, "_library", None)
    monkeypatch.setattr(isa, "_tried", True)
    assert Sampler(drawn)(values.numpy(), requests)[0] == found
    assert len(set(found)) > 10


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("company", [False, True])
def test_where_no_logit_is_a_number_there_is_no_token_in_any_company(temperature: float, company: bool) -> None:
    nan, infinite = float("nan"), float("inf")
    rows = [[nan, 1.0, -50.0], [nan] * 3, [-infinite] * 3, *([[1.0, 0.0, 0.0]] if company else [])]
    settings = [Sampling(temperature=temperature)] * 3 + [Sampling(temperature=0.7)] * company
    requests = [Request(number, 1, sampling, frozenset(), [0]) for number, sampling in enumerate(settings)]
    assert Sampler(drawn)(np.array(rows, np.float32), requests)[0][:3] == [1, -1, -1]


def test_any_top_k_is_taken() -> None:
    request = Request(1, 1, Sampling(temperature=1.0, top_k=10**400), frozenset(), [0])
    assert Sampler(drawn)(np.array([[1.0, 2.0]], np.float32), [request])[0][0] in (0, 1)
