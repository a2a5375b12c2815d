"""Scores of prompts and answers, embeddings, copies and penalties, beside plain passes and transformers' own processors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base.errors import RequestError
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.penalties import alter
from lineshaft.engine.sampler import score
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.sched.request import Ask, Emitted, Event, Pooled, PromptScored, Request, Sampling, Started

Forward = Callable[[Decoder, list[int]], torch.Tensor]
Tiny = Callable[..., Decoder]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


def told(engine: Engine, *asks: Ask) -> list[Event]:
    for ask in asks:
        engine.submit(ask)
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
        engine.scheduler.check()
    assert not engine.readings._scores
    assert not engine.readings._sums
    return events


def chunked(model: Decoder) -> Engine:
    """Reads seven tokens a step."""
    return Engine(model, EngineConfig(page_tokens=4, cache_bytes=1 << 20, scheduler={"step_tokens": 7}))


def test_a_scored_prompt_is_as_likely_as_in_a_plain_pass(model: Decoder, forward: Forward) -> None:
    events = told(chunked(model), Ask(PROMPT, Sampling(max_tokens=2, temperature=0, logprobs=3), "score"))
    scored, *answer = [event for event in events if not isinstance(event, Started)]
    assert isinstance(scored, PromptScored)
    assert [type(event) for event in answer] == [Emitted, Emitted]
    chances = torch.log_softmax(forward(model, PROMPT).double(), -1)
    assert scored.scores[0] is None
    assert len(scored.scores) == len(PROMPT)
    for place, got in enumerate(scored.scores[1:], 1):
        assert got is not None
        assert got.logprob == pytest.approx(chances[place - 1, PROMPT[place]].item(), abs=1e-4)
        ranked = chances[place - 1].topk(3)
        assert [pair[1] for pair in got.top] == pytest.approx(ranked.values.tolist(), abs=1e-4)


def test_an_answers_tokens_are_scored_by_the_models_own_logits(tiny: Tiny, forward: Forward) -> None:
    """Not by what temperature, bias and penalties made of them."""
    model = tiny("qwen3")
    sampling = Sampling(max_tokens=6, temperature=2.0, seed=1, logprobs=0, logit_bias={7: 3.0}, frequency_penalty=1.0)
    answer = [event for event in told(chunked(model), Ask(PROMPT, sampling)) if isinstance(event, Emitted)]
    text = [*PROMPT, *(event.token for event in answer)]
    chances = torch.log_softmax(forward(model, text).double(), -1)
    for place, event in enumerate(answer, len(PROMPT) - 1):
        assert event.score is not None
        assert event.score.top == ()
        assert event.score.logprob == pytest.approx(chances[place, event.token].item(), abs=1e-4)


def test_equally_likely_tokens_are_listed_by_their_ids() -> None:
    got = score(np.array([1.0, 3.0, 3.0, 0.0, 3.0], np.float32), 0, 2)
    assert [token for token, _ in got.top] == [1, 2]
    assert len(score(np.zeros(3, np.float32), 1, 20).top) == 3


@given(st.integers(1, 700), st.integers(1, 20), st.integers(0, 999), st.sampled_from([np.inf, 3.0, 0.0]))
def test_the_likeliest_are_those_of_a_sort(width: int, top: int, seed: int, ceiling: float) -> None:
    """Ties too: a low ceiling makes many of the greatest equal."""
    logits = np.minimum(np.random.default_rng(seed).normal(size=width).astype(np.float32) * 4, np.float32(ceiling))
    chances = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    order = np.lexsort((np.arange(width), -logits))[:top]
    got = score(logits, int(order[0]), top)
    assert [token for token, _ in got.top] == order.tolist()
    assert [chance for _, chance in got.top] == pytest.approx(chances[order].tolist(), abs=1e-5)
    assert got.logprob == pytest.approx(chances[order[0]], abs=1e-5)


def test_an_embedding_is_the_mean_of_the_final_hidden_states(model: Decoder) -> None:
    (got,) = [event for event in told(chunked(model), Ask(PROMPT, Sampling(max_tokens=1), "embed")) if isinstance(event, Pooled)]
    with torch.inference_mode():
        plain = model.hidden(torch.tensor(PROMPT), torch.arange(len(PROMPT)), PackedCausal([0], len(PROMPT))).double().mean(0)
    assert np.abs(np.array(got.embedding) - plain.numpy()).max() <= 1e-4 * plain.abs().max()


def test_embeddings_answers_and_scores_run_side_by_side(model: Decoder) -> None:
    engine = chunked(model)
    asks = [Ask(PROMPT, Sampling(max_tokens=3, temperature=0), task) for task in ("generate", "embed", "score", "embed")]
    events = told(engine, *asks)
    assert sum(isinstance(event, Pooled) for event in events) == 2
    answers = {number: [e.token for e in events if isinstance(e, Emitted) and e.request == number] for number in (1, 3)}
    assert answers[1] == answers[3]
    assert len(answers[1]) == 3


def test_a_cancelled_reading_leaves_nothing(tiny: Tiny) -> None:
    engine = chunked(tiny("qwen3"))
    for task in ("embed", "score"):
        (number,) = engine.submit(Ask(PROMPT, Sampling(max_tokens=1), task))
        engine.step()
        engine.cancel(number)
    assert engine.idle
    assert not engine.readings._scores
    assert not engine.readings._sums


def test_a_scored_prompt_that_gives_way_is_scored_once(tiny: Tiny) -> None:
    engine = Engine(tiny("qwen3"), EngineConfig(page_tokens=4, cache_bytes=1 << 20, scheduler={"step_tokens": 7, "max_batch": 1}))
    (low,) = engine.submit(Ask(PROMPT, Sampling(max_tokens=4, temperature=0, logprobs=0), "score", priority=1))
    events = [*engine.step(), *engine.step()]  # fourteen of its eighteen tokens
    engine.submit(Ask([1, 2], Sampling(max_tokens=2, temperature=0)))
    while not engine.idle:
        events += engine.step()
    assert engine.load_now().preemptions == 1
    (scored,) = [event for event in events if isinstance(event, PromptScored)]
    alone = told(chunked(tiny("qwen3")), Ask(PROMPT, Sampling(max_tokens=4, temperature=0, logprobs=0), "score"))
    assert scored.scores == next(event.scores for event in alone if isinstance(event, PromptScored))
    assert [e.token for e in events if isinstance(e, Emitted) and e.request == low] == [e.token for e in alone if isinstance(e, Emitted)]


@pytest.mark.parametrize("task", ["generate", "score"])
def test_copies_have_seeds_of_their_own_and_each_answers_as_it_would_alone(model: Decoder, task: str) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.5, seed=2**63 - 1, logprobs=1)
    engine = chunked(model)
    numbers = engine.submit(Ask(PROMPT, sampling, task, copies=3))
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    together = [[(e.token, e.score) for e in events if isinstance(e, Emitted) and e.request == number] for number in numbers]
    assert len({tuple(token for token, _ in own) for own in together}) == 3
    for own, seed in zip(together, (2**63 - 1, -(2**63), -(2**63) + 1), strict=True):
        alone = told(chunked(model), Ask(PROMPT, sampling.model_copy(update={"seed": seed}), task))
        assert own == [(e.token, e.score) for e in alone if isinstance(e, Emitted)]


def test_a_bias_for_a_token_that_is_not_there_is_refused(tiny: Tiny) -> None:
    with pytest.raises(RequestError, match="token id 61 is outside") as refused:
        chunked(tiny("qwen3")).submit(Ask([1], Sampling(logit_bias={61: 1.0})))
    assert refused.value.param == "logit_bias"


def altered(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """A row after bias and penalties; what they changed is named, and can be put back."""
    row = logits.numpy().copy()
    ids, before = alter(row, request)
    back = row.copy()
    back[ids] = before
    assert (back == logits.numpy()).all()
    return torch.from_numpy(row)


TOKENS = st.lists(st.integers(0, 19), min_size=1, max_size=30)


@given(prompt=TOKENS, answer=st.lists(st.integers(0, 19), max_size=30), penalty=st.sampled_from([0.5, 1.2, 2.0]), seed=st.integers(0, 999))
def test_the_repetition_penalty_is_transformers(prompt: list[int], answer: list[int], penalty: float, seed: int) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    request = Request(1, len(prompt), Sampling(repetition_penalty=penalty), frozenset(), [*prompt, *answer])
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([[*prompt, *answer]]), logits[None].clone())[0]
    torch.testing.assert_close(altered(logits, request), expected)


@given(prompt=TOKENS, answer=st.lists(st.integers(0, 19), max_size=30), often=st.floats(-2, 2), once=st.floats(-2, 2))
def test_frequency_and_presence_are_taken_from_the_answer(prompt: list[int], answer: list[int], often: float, once: float) -> None:
    """As OpenAI writes it: logit - count * frequency - (count > 0) * presence."""
    logits = np.linspace(-3, 3, 20)
    sampling = Sampling(frequency_penalty=often, presence_penalty=once, logit_bias={4: -100.0})
    got = altered(torch.tensor(logits, dtype=torch.float32), Request(1, len(prompt), sampling, frozenset(), [*prompt, *answer]))
    counts = np.bincount(answer, minlength=20)
    expected = logits - counts * often - (counts > 0) * once - 100.0 * (np.arange(20) == 4)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
