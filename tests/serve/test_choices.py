"""Several answers to one request, echoes and log-probabilities, as the official client reads them."""

import gc
import json
import threading

import openai
import pytest
from fake_engine import TEXT, FakeEngine, score, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from world import MODEL, serving, until

from lineshaft.sched.request import Emitted, Score
from lineshaft.serve.answer import Piece, Scored, Telling
from lineshaft.serve.names import Names as Named
from lineshaft.serve.replies import Usage
from lineshaft.serve.voice import ChatVoice, CompletionVoice

ASK = {"model": MODEL, "prompt": "hello", "max_tokens": 64}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
WORDS = tokenizer().encode(TEXT)


def texts_by_index(chunks):
    told = {}
    for chunk in chunks:
        for choice in chunk.choices:
            told[choice.index] = told.get(choice.index, "") + (choice.text if hasattr(choice, "text") else choice.delta.content or "")
    return told


def chunks_of(text):
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event.startswith("data: {")]


# -- several answers ------------------------------------------------------------------------------------------------


def test_choices_are_numbered_prompt_by_prompt_and_each_prompt_is_counted_once(world):
    answer = world.client().completions.create(**{**ASK, "prompt": ["a", "longer"]}, n=3, extra_body={"best_of": 3})
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert {choice.text for choice in answer.choices} == {TEXT}
    asks = [request.ask for request in world.engine.submitted[-6:]]
    assert [ask.copies for ask in asks] == [3] * 6
    assert [tokenizer().decode(ask.prompt) for ask in asks] == ["a"] * 3 + ["longer"] * 3
    assert answer.usage.prompt_tokens == len(asks[0].prompt) + len(asks[3].prompt)
    assert answer.usage.completion_tokens == 6 * (len(WORDS) + 1)


def test_prompts_may_be_lists_of_ids(world):
    prompts = [tokenizer().encode(text) for text in ("one", "two")]
    answer = world.client().completions.create(**{**ASK, "prompt": prompts}, echo=True)
    assert [choice.text for choice in answer.choices] == ["one" + TEXT, "two" + TEXT]


def test_streamed_choices_come_interleaved(world):
    chunks = list(world.client().completions.create(**ASK, n=3, stream=True))
    assert texts_by_index(chunks) == {0: TEXT, 1: TEXT, 2: TEXT}
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order)
    assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason) == [0, 1, 2]


def test_a_chat_stream_of_several_choices_opens_each_with_its_role(world):
    chunks = list(world.client().chat.completions.create(**CHAT, n=2, stream=True))
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:2]] == [(0, "assistant"), (1, "assistant")]
    assert texts_by_index(chunks) == {0: TEXT, 1: TEXT}
    whole = world.client().chat.completions.create(**CHAT, n=2)
    assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]


def test_usage_comes_with_every_chunk_when_that_is_asked_for(world):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(world.client().completions.create(**ASK, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, len(WORDS) + 1)
    assert chunks[-1].choices == []


def test_a_stop_string_ends_one_choice_and_not_the_others(world):
    """All say the same here, so each ends where it would alone."""
    answer = world.client().completions.create(**ASK, n=2, stop="STOP")
    assert [choice.text for choice in answer.choices] == [TEXT[: TEXT.index("STOP")]] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2


def test_a_client_that_hangs_up_cancels_all_choices():
    with serving(FakeEngine(gate=threading.Semaphore(0))) as world:
        world.engine.gate.release(2)
        with world.client().completions.create(**ASK, n=3, stream=True) as stream:
            next(iter(stream))
        world.engine.gate.release(1)
        until(lambda: not world.worker.in_flight)
        world.engine.gate.release(10)
        world.engine.wait(lambda engine: sorted(engine.cancelled) == [0, 1, 2])


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_told_once_for_all_choices(stream, capfd, caplog):
    with serving(FakeEngine(break_at=3), FakeEngine()) as world:
        with pytest.raises(openai.APIError, match="may be sent again"):
            list(world.client().completions.create(**ASK, n=3, stream=stream))
        until(lambda: not world.worker.in_flight and world.worker.state == "ready")
        gc.collect()
        assert world.client().completions.create(**ASK, n=3).choices[2].text == TEXT
    assert "never retrieved" not in capfd.readouterr().err + caplog.text


def test_when_the_queue_is_full_in_the_middle_of_a_request_none_of_it_stays():
    with serving(FakeEngine(gate=threading.Semaphore(0), slots=1), max_waiting=2) as world:
        with pytest.raises(openai.RateLimitError):
            world.client().completions.create(**{**ASK, "prompt": ["a", "b", "c"]})
        until(lambda: not world.worker.in_flight)
        world.engine.gate.release(1000)
        assert world.client().completions.create(**ASK).choices[0].text == TEXT


# -- echo and log-probabilities -------------------------------------------------------------------------------------


def test_logprobs_of_a_completion_fit_its_text(world):
    told = world.client().completions.create(**ASK, logprobs=2).choices[0].logprobs
    assert told.token_logprobs == [score(token, 2).logprob for token in WORDS]
    assert [len(top) for top in told.top_logprobs] == [3] * len(WORDS)
    assert all(top[name] == own for top, name, own in zip(told.top_logprobs, told.tokens, told.token_logprobs, strict=True))
    for name, offset in zip(told.tokens, told.text_offset, strict=True):
        assert name.startswith("bytes:") or TEXT.startswith(name, offset)


def test_echo_with_logprobs_scores_the_prompt_and_its_first_token_has_none(world):
    choice = world.client().completions.create(**{**ASK, "prompt": "price 价格"}, echo=True, logprobs=2).choices[0]
    assert choice.text == "price 价格" + TEXT
    told, prompt = choice.logprobs, world.engine.submitted[-1].prompt
    assert world.engine.submitted[-1].ask.task == "score"
    assert (told.tokens[0], told.token_logprobs[0], told.top_logprobs[0]) == ("<bos>", None, None)
    assert told.token_logprobs[1:] == [score(token, 2).logprob for token in [*prompt[1:], *WORDS]]
    for name, offset in zip(told.tokens[1:], told.text_offset[1:], strict=True):
        assert name.startswith("bytes:") or choice.text.startswith(name, offset)


def test_the_prompt_alone_can_be_scored(world):
    """As evaluation harnesses do: no answer, ids in, log-probabilities out."""
    ids = tokenizer().encode("price 价格")
    answer = world.client().completions.create(model=MODEL, prompt=[ids, ids], max_tokens=0, echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["price 价格"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert answer.choices[1].logprobs.token_logprobs == [None, *(score(token, 1).logprob for token in ids[1:])]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * len(ids), 0)


def test_where_two_tokens_have_one_name_the_likelier_is_told():
    class Names:
        def name(self, token):
            return "same" if token < 9 else "other"

    piece = Piece(0, "x", [Scored(2, Score(-3.0, ((1, -0.5), (9, -1.0))), 0)], "stop")
    choice = CompletionVoice("m", Names()).whole([piece], Usage(1, 1, 2)).choices[0]
    assert choice.logprobs.top_logprobs == [{"same": -0.5, "other": -1.0}]
    assert choice.logprobs.token_logprobs == [-3.0]


def test_a_token_that_can_never_come_has_a_number_all_the_same():
    piece = Piece(0, "x", [Scored(5, Score(float("-inf"), ()), 0)], "stop")
    told = ChatVoice("m", Named(tokenizer())).whole([piece], Usage(1, 1, 2)).choices[0].logprobs.content[0]
    assert told.logprob == -9999.0


def test_nothing_asked_for_is_refused(world):
    with pytest.raises(openai.BadRequestError, match="echo"):
        world.client().completions.create(**{**ASK, "max_tokens": 0})


def test_each_choice_of_a_scored_prompt_has_the_scores_and_its_own_seed(world):
    answer = world.client().completions.create(**{**ASK, "prompt": ["a", "b"]}, n=2, seed=(1 << 63) - 1, echo=True, logprobs=0)
    asks = [request.ask for request in world.engine.submitted[-4:]]
    assert [(ask.task, ask.copies, ask.sampling.seed) for ask in asks] == [("score", 1, (1 << 63) - 1), ("score", 1, -(1 << 63))] * 2
    assert [choice.text for choice in answer.choices] == ["a" + TEXT] * 2 + ["b" + TEXT] * 2
    assert all(len(choice.logprobs.tokens) == len(WORDS) + 2 for choice in answer.choices)
    assert answer.usage.prompt_tokens == 4


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_streamed_echo_begins_with_the_prompt(world, logprobs):
    chunks = list(world.client().completions.create(**ASK, echo=True, logprobs=logprobs, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello" + TEXT
    offsets = [place for chunk in chunks if chunk.choices[0].logprobs for place in chunk.choices[0].logprobs.text_offset]
    assert offsets == sorted(offsets)
    assert len(offsets) == (len(world.engine.submitted[-1].prompt) + len(WORDS) if logprobs else 0)


def test_chat_logprobs_hold_the_bytes_of_each_token_and_streaming_tells_the_same(world):
    whole = world.client().chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in whole).decode() == TEXT
    assert [item.logprob for item in whole] == [score(token, 2).logprob for token in WORDS]
    assert [len(item.top_logprobs) for item in whole] == [2] * len(WORDS)
    assert all(item.token.encode() == bytes(item.bytes) for item in whole if not item.token.startswith("bytes:"))
    chunks = list(world.client().chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=True))
    assert [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content] == whole


def test_logprobs_without_alternatives_are_told_without_them(world):
    told = world.client().chat.completions.create(**CHAT, logprobs=True).choices[0].logprobs.content
    assert all(item.top_logprobs == [] for item in told)
    assert world.client().chat.completions.create(**CHAT).choices[0].logprobs is None


def test_tokens_of_what_a_stop_string_took_away_are_not_told(world):
    choice = world.client().completions.create(**ASK, stop="STOP", logprobs=0).choices[0]
    assert choice.text == TEXT[: TEXT.index("STOP")]
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    assert len(choice.logprobs.tokens) < len(WORDS)
    assert choice.logprobs.tokens[-1] == " STOP"  # its space is shown, so it is told, and a token is told whole


# -- telling, by itself ---------------------------------------------------------------------------------------------

CHINESE = st.text(alphabet="价格 a😀👩‍👩‍👧é罕\n", max_size=20)


@settings(max_examples=300)
@given(CHINESE, st.lists(st.text(alphabet="价a😀 ", min_size=1, max_size=3), max_size=2))
def test_pieces_hold_whole_characters_and_each_token_once_at_its_place(text, stops):
    ids = tokenizer().encode(text)
    telling = Telling(0, tokenizer(), stops)
    pieces = []
    for number, token in enumerate([*ids, tokenizer().eos_id]):
        if telling.finish:
            break
        pieces.append(telling.take(Emitted(0, token, "stop" if number == len(ids) else None, score(token, 0))))
    told, tokens = "".join(piece.text for piece in pieces), [item for piece in pieces for item in piece.tokens]
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert text.startswith(told)
    assert "\ufffd" not in told
    assert bool(ends) or told == text
    assert [item.token for item in tokens] == ids[: len(tokens)]
    assert not tokens or bool(ends) or len(tokens) == len(ids)
    shown = 0
    for piece in pieces:
        shown += len(piece.text)
        assert all(item.offset < shown for item in piece.tokens)
