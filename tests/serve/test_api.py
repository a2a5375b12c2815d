"""The OpenAI interface as the official client sees it."""

import asyncio
import json
import threading

import aiohttp
import msgspec
import openai
import pytest
from fake_engine import CONTEXT_TOKENS, TEXT, FakeEngine, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from world import MODEL, serving, until

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.errors import CacheFull
from lineshaft.sched.request import Sampling
from lineshaft.serve.limits import Limits
from lineshaft.serve.replies import ErrorAnswer
from lineshaft.serve.wire import ChatAsked

ASK = {"model": MODEL, "prompt": "hello", "max_tokens": 64}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


def events(text):
    """The data of each server-sent event."""
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


# -- answers ------------------------------------------------------------------------------------------------------


def test_a_completion_has_the_text_the_reason_and_the_counts(world):
    answer = world.client().completions.create(**ASK)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 1 + len(tokenizer().encode("hello"))
    assert answer.usage.completion_tokens == len(tokenizer().encode(TEXT)) + 1
    assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")


def test_a_streamed_completion_is_the_same_text_in_pieces(world):
    chunks = list(world.client().completions.create(**ASK, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_answer_has_the_role_of_the_assistant(world):
    answer = world.client().chat.completions.create(**CHAT)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.object == "chat.completion"


def test_a_chat_stream_opens_with_the_role_and_closes_with_reason_usage_and_done(world):
    status, headers, text = world.post("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(text)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == TEXT
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == sum(chunks[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_the_official_client_reads_the_chat_stream(world):
    with world.client().chat.completions.stream(**CHAT) as stream:
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_tokens_are_sent_as_they_come_and_not_when_all_are_there():
    with serving(FakeEngine(gate=threading.Semaphore(0))) as world:
        world.engine.gate.release(2)
        with world.client().completions.create(**ASK, stream=True) as stream:
            assert next(iter(stream)).choices[0].text
            assert world.engine.steps <= 2
            world.engine.gate.release(1000)


def test_max_tokens_ends_with_length_and_an_incomplete_character_is_shown_as_such():
    with serving(FakeEngine("罕")) as world:
        assert len(tokenizer().encode("罕")) == 3
        answer = world.client().completions.create(**{**ASK, "max_tokens": 2})
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("\ufffd", "length", 2)


def test_a_completion_is_16_tokens_long_by_default_and_a_chat_fills_the_context():
    with serving(FakeEngine("long " * 400)) as world:
        client = world.client()
        assert client.completions.create(model=MODEL, prompt="hello").usage.completion_tokens == 16
        assert client.chat.completions.create(**CHAT).usage.total_tokens == CONTEXT_TOKENS


def test_the_chat_template_is_what_the_engine_gets_to_read(world):
    world.client().chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    )
    prompt = world.engine.submitted[-1].prompt
    assert prompt[0] == tokenizer().bos_id
    assert tokenizer().decode(prompt) == "<|system|>Be kind.<|user|>ab<|assistant|>"


def test_a_message_that_a_client_sends_back_with_nulls_is_taken(world):
    said = world.client().chat.completions.create(**CHAT).choices[0].message
    answer = world.client().chat.completions.create(model=MODEL, messages=[*CHAT["messages"], said, *CHAT["messages"]])
    assert answer.choices[0].message.content == TEXT


@pytest.mark.parametrize(
    "prompt", ["hello", ["hello"], tokenizer().encode("hello"), [tokenizer().encode("hello")]], ids=["text", "texts", "ids", "lists"]
)
def test_a_prompt_may_be_a_text_or_ids_alone_or_in_a_list(world, prompt):
    assert world.client().completions.create(**{**ASK, "prompt": prompt}).choices[0].text == TEXT
    assert tokenizer().decode(world.engine.submitted[-1].prompt) == "hello"


def test_sampling_fields_reach_the_engine_and_vllms_all_is_ours(world):
    extra = {"top_k": -1, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [7], "repetition_penalty": 1.1, "priority": -2}
    biased = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"7": -100, "8": 2.5}, "logprobs": 3}
    world.client().completions.create(**ASK, temperature=0, top_p=0.5, seed=-3, user="u", **biased, extra_body=extra)
    assert world.engine.submitted[-1].sampling == Sampling(
        max_tokens=64, temperature=0.0, top_k=0, top_p=0.5, min_p=0.1, seed=-3, stop_token_ids=[7], ignore_eos=True,
        repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-1.0, logit_bias={7: -100.0, 8: 2.5}, logprobs=3,
    )  # fmt: skip
    assert world.engine.submitted[-1].ask.priority == -2


def test_fields_that_ask_for_what_happens_anyway_are_taken(world):
    extra = {
        "best_of": 1,
        "echo": False,
        "suffix": "",
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "n": 1,
        "logprobs": None,
    }
    assert world.client().completions.create(**ASK, extra_body=extra).choices[0].text == TEXT
    harmless = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logprobs": False}
    assert world.client().chat.completions.create(**CHAT, extra_body=harmless).choices


# -- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_ends_the_answer_and_is_not_shown(world, stream):
    before = len(world.engine.cancelled)
    answer = world.client().completions.create(**ASK, stop=["never", "d. STO", "STOP"], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT[: TEXT.index("d. STO")]
    assert chunks[-1].choices[0].finish_reason == "stop"
    world.engine.wait(lambda engine: len(engine.requests) == 0)
    assert len(world.engine.cancelled) <= before + 1


def test_text_that_only_began_like_a_stop_string_is_shown_in_the_end(world):
    answer = world.client().completions.create(**ASK, stop="go on and on")
    assert answer.choices[0].text == TEXT


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "7"), ("max_tokens", True), ("max_tokens", 1 << 80),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2),
        ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", 3), ("prompt", [-1]), ("prompt", [10_000]), ("prompt", ["a", [1]]),
        ("prompt", [True]), ("prompt", ["a", 1]), ("prompt", None), ("stop", ""), ("stop", ["a"] * 17), ("stop", 3),
        ("seed", 1 << 64), ("seed", "x"),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("stop_token_ids", [10_000]), ("stop_token_ids", "x"), ("user", 3),
        ("n", 0), ("n", True), ("n", 65), ("best_of", 2), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("echo", 1),
        ("suffix", "x"), ("tools", [{}]), ("response_format", {"type": "json_object"}), ("logit_bias", {"x": 2}),
        ("logit_bias", {"1": 101}), ("logit_bias", {"10000": 1}), ("logit_bias", {"01": 1}),
        ("logit_bias", [1]), ("presence_penalty", 2.1), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("priority", 1 << 40), ("stream_options", {"continuous_usage_stats": True}), ("top_logprobs", 2),
        ("messages", []), ("no_such_field", 1), ("temperatur", 1),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_by_its_name(world, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        world.client().completions.create(model=MODEL, prompt="x", extra_body={field: value})
    assert caught.value.body["param"] == field
    assert field in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages", {"messages": [{"role": "developer", "content": "the template refuses this one"}]}),
        ("messages", {"messages": [{"role": "user"}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}),
        ("messages", {"messages": "hi"}),
        ("max_completion_tokens", {"max_completion_tokens": 5, "max_tokens": 6}),
        ("prompt", {"prompt": "hi"}),
        ("model", {"model": 3}),
    ],
)
def test_a_bad_chat_is_refused_by_its_field(world, field, body):
    status, _, answer = world.post("/v1/chat/completions", {**CHAT, **body})
    assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(world, missing):
    status, _, answer = world.post("/v1/completions", {key: value for key, value in ASK.items() if key != missing})
    assert (status, answer["error"]["param"]) == (400, missing)


def test_an_unknown_model_is_not_found(world):
    with pytest.raises(openai.NotFoundError) as caught:
        world.client().completions.create(**{**ASK, "model": "gpt-4"})
    assert caught.value.code == "model_not_found"


def test_a_prompt_longer_than_the_context_is_refused(world):
    for options in ({"prompt": "a b " * CONTEXT_TOKENS}, {"max_tokens": CONTEXT_TOKENS}):
        with pytest.raises(openai.BadRequestError) as caught:
            world.client().completions.create(**{**ASK, **options})
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 5000, b'{"a":' * 5000,
     b'{"model": NaN}', b'{"prompt": "\\ud800"}', b"\xef\xbb\xbf{}"],
    ids=range(12),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(world, body):
    status, _, answer = world.call("POST", "/v1/completions", data=body, headers={"content-type": "application/json"})
    assert status == 400
    msgspec.convert(answer, ErrorAnswer)


def test_a_body_that_is_not_called_json_is_refused(world):
    status, _, answer = world.call(
        "POST", "/v1/completions", data=b"prompt=x", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_over_the_limit_is_refused_whether_its_size_was_told_or_not():
    async def pieces():
        for _ in range(100):
            yield b" " * 100

    with serving(FakeEngine(), limits=Limits(max_body_bytes=2000)) as world:
        for body in (b" " * 2001, pieces()):
            status, _, answer = world.call("POST", "/v1/completions", data=body, headers={"content-type": "application/json"})
            assert (status, answer["error"]["code"]) == (413, "request_too_large")
        assert world.post("/v1/completions", ASK)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/nothing", 404), ("POST", "/v1/models/gpt-4", 405), ("GET", "/v1/models/gpt-4", 404),
     ("GET", "/v1/completions", 405), ("DELETE", "/health", 405), ("POST", "/metrics", 405),
     ("GET", "/v1/models/", 404), ("GET", "/%ff%00", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods_are_refused_in_the_same_shape(world, method, path, status):
    got, headers, answer = world.call(method, path)
    assert got == status
    msgspec.convert(answer, ErrorAnswer)
    assert (status == 405) == ("allow" in headers)


def test_a_full_queue_is_429_with_a_time_to_come_back():
    with serving(FakeEngine(gate=threading.Semaphore(0), slots=1), max_waiting=2) as world:
        threads = [threading.Thread(target=world.post, args=("/v1/completions", ASK)) for _ in range(2)]
        for thread in threads:
            thread.start()
        world.engine.wait(lambda engine: len(engine.submitted) >= 1)
        until(lambda: world.worker.in_flight == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            world.client().completions.create(**ASK)
        assert caught.value.response.headers["retry-after"]
        world.engine.gate.release(1000)
        for thread in threads:
            thread.join()
        assert world.post("/v1/completions", ASK)[0] == 200


def test_a_request_that_never_fits_the_cache_is_429():
    with serving(FakeEngine(refusal=CacheFull(9, 4))) as world, pytest.raises(openai.RateLimitError, match="9 cache pages"):
        world.client().completions.create(**ASK, stream=True)


def test_a_model_that_still_loads_is_a_server_error_that_the_client_may_retry():
    loading = threading.Event()
    with serving(load=lambda: loading.wait() and FakeEngine()) as world:
        with pytest.raises(openai.InternalServerError) as caught:
            world.client().embeddings.create(model=MODEL, input="x")
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        assert caught.value.response.headers["retry-after"]
        loading.set()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from([*ChatAsked.__struct_fields__, "prompt", "n"]), VALUES, max_size=4).map(json.dumps).map(str.encode)


@settings(max_examples=200)
@given(bodies=st.lists(st.binary(max_size=60) | BODIES | BODIES.map(lambda body: body[:-3]), min_size=2, max_size=2))
def test_the_server_lives_on_after_hundreds_of_malformed_bodies(world, bodies):
    async def send():
        async with aiohttp.ClientSession(headers={"content-type": "application/json"}) as session:
            for path, body in zip(("/v1/completions", "/v1/chat/completions"), bodies, strict=True):
                async with session.post(world.url + path, data=body) as answer:
                    assert answer.status in (400, 404)
                    msgspec.convert(await answer.json(), ErrorAnswer)

    asyncio.run(send())
    assert world.worker.state == "ready"


# -- what is served, and how it fares -------------------------------------------------------------------------------


def test_the_model_is_listed(world):
    listed = world.client().models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert world.client().models.retrieve(MODEL).max_model_len == CONTEXT_TOKENS


def test_health_and_readiness_are_green(world):
    assert world.call("GET", "/health")[0] == 200
    assert world.call("GET", "/ready")[0] == 200


def test_metrics_are_the_catalogues_and_count_what_happened():
    with serving(FakeEngine()) as world:
        answer = world.client().completions.create(**ASK)
        assert world.call("GET", "/nothing")[0] == 404
        _, headers, text = world.call("GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert set(families) == {name for name, entry in CATALOGUE.items() if entry.instrument != "value"}
    totals = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert totals["vllm:prompt_tokens_total"] == answer.usage.prompt_tokens
    assert totals["vllm:generation_tokens_total"] == answer.usage.completion_tokens
    assert totals["vllm:time_to_first_token_seconds_count"] == totals["vllm:e2e_request_latency_seconds_count"] == 1
    assert totals["vllm:request_queue_time_seconds_count"] == 1
    assert totals["vllm:inter_token_latency_seconds_count"] == answer.usage.completion_tokens - 1
    assert totals["vllm:num_requests_running"] == totals["vllm:num_requests_waiting"] == 0
    success = [sample for sample in families["vllm:request_success"].samples if sample.labels["finished_reason"] == "stop"]
    assert success[0].value == 1 and success[0].labels["model_name"] == MODEL
    assert families["lineshaft:http_errors"].samples[0].labels == {"status": "404"}
