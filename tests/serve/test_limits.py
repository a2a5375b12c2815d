"""What is over a limit is refused with its reason, and the engine stops working on it."""

import asyncio
import json
import socket
import threading
import time

import openai
import pytest
from fake_engine import TEXT, FakeEngine, tokenizer
from world import MODEL, serving, until

from lineshaft.base.errors import Capacity
from lineshaft.serve.limits import Limits
from lineshaft.serve.pending import Deadline

ASK = {"model": MODEL, "prompt": "hello", "max_tokens": 64}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
HELLO = 1 + len(tokenizer().encode("hello"))


def gated():
    return FakeEngine(gate=threading.Semaphore(0))


# -- tokens and choices ---------------------------------------------------------------------------------------------


def test_tokens_over_the_limit_are_413_with_the_sum():
    with serving(FakeEngine(), limits=Limits(max_request_tokens=HELLO + 128)) as world:
        assert world.post("/v1/completions", {**ASK, "n": 2})[0] == 200
        status, _, answer = world.post("/v1/completions", {**ASK, "n": 3})
        assert (status, answer["error"]["code"]) == (413, "too_many_tokens")
        assert f"asks for {HELLO + 3 * 64} tokens" in answer["error"]["message"]
        assert world.post("/v1/embeddings", {"model": MODEL, "input": ["a b c d e f g h"] * 20})[0] == 413


def test_a_chat_without_max_tokens_is_as_long_as_the_limit_lets_it_be():
    with serving(FakeEngine("long " * 400), limits=Limits(max_request_tokens=100)) as world:
        usage = world.client().chat.completions.create(**CHAT, n=2).usage
        assert 98 <= usage.total_tokens <= 100


def test_choices_over_the_limit_are_refused():
    with serving(FakeEngine(), limits=Limits(max_choices=3)) as world:
        assert world.post("/v1/completions", {**ASK, "n": 3})[0] == 200
        for body in ({**ASK, "n": 4}, {**ASK, "prompt": ["a", "b"], "n": 2}, {**ASK, "prompt": ["a"] * 4}):
            status, _, answer = world.post("/v1/completions", body)
            assert status == 400
            assert "4 answers in one request" in answer["error"]["message"]


# -- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [ASK, {**ASK, "n": 2}, {**ASK, "stream": True}], ids=["one", "two", "stream"])
def test_an_answer_that_takes_too_long_is_408_and_its_work_is_cancelled(body):
    with serving(gated(), limits=Limits(request_seconds=0.3)) as world:
        status, headers, answer = world.post("/v1/completions", body)
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (408, "request_timeout", "timeout_error")
        assert headers["retry-after"]
        world.engine.gate.release(1)
        world.engine.wait(lambda engine: len(engine.cancelled) == body.get("n", 1))
        world.engine.gate.release(1000)


def test_embeddings_that_take_too_long_are_408():
    with serving(gated(), limits=Limits(request_seconds=0.3)) as world:
        assert world.post("/v1/embeddings", {"model": MODEL, "input": "hello"})[0] == 408
        until(lambda: not world.worker.in_flight)


def test_a_stream_that_takes_too_long_ends_with_an_error():
    with serving(gated(), limits=Limits(request_seconds=0.5)) as world:
        world.engine.gate.release(3)
        status, _, text = world.post("/v1/completions", {**ASK, "stream": True})
        *_, error, done, _ = text.split("\n\n")
        assert (status, done) == (200, "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_timeout"
        until(lambda: not world.worker.in_flight)


def test_the_official_client_sees_a_408_as_what_it_is():
    with serving(gated(), limits=Limits(request_seconds=0.2)) as world, pytest.raises(openai.APIStatusError) as caught:
        world.client().completions.create(**ASK)
    assert caught.value.status_code == 408


def test_a_client_that_gives_up_first_gets_its_own_timeout():
    with serving(gated()) as world:
        with pytest.raises(openai.APITimeoutError):
            world.client().with_options(timeout=0.3).completions.create(**ASK)
        until(lambda: not world.worker.in_flight)


def test_a_body_that_does_not_arrive_is_408_and_the_connection_is_closed():
    with serving(FakeEngine(), limits=Limits(body_seconds=0.3)) as world:
        host, port = world.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
            told = b""
            while part := client.recv(4096):  # ends when the server closes
                told += part
        assert told.startswith(b"HTTP/1.1 408 ")
        assert b"retry-after: 1" in told and b'"code":"body_timeout"' in told
        assert world.post("/v1/completions", ASK)[0] == 200


def test_a_client_that_does_not_read_its_stream_is_let_go(monkeypatch):
    monkeypatch.setattr("lineshaft.serve.api._SLOW_READER_SECONDS", 0.2)
    with serving(FakeEngine(text="x" * 200, slots=64), limits=Limits(request_seconds=1.0)) as world:
        host, port = world.url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, "max_tokens": 200, "stream": True, "logprobs": 20, "n": 60}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            until(lambda: len(world.engine.submitted) == 60)
            began = time.monotonic()
            until(lambda: not world.worker.in_flight)
            assert time.monotonic() - began < 10
        assert world.client().completions.create(model=MODEL, prompt="x").choices


def test_a_request_that_used_up_its_time_before_it_began_is_408():
    async def late():
        clock = Deadline(arrived=time.monotonic() - 10, seconds=5)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await clock.keep(at_once())

    async def at_once():
        return "an answer"

    with pytest.raises(Capacity) as caught:
        asyncio.run(late())
    assert caught.value.status == 408


def test_a_size_told_in_advance_is_refused_before_anything_is_read():
    with serving(FakeEngine(TEXT), limits=Limits(max_body_bytes=100)) as world:
        host, port = world.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
