"""The frames between server and engine process: any split of bytes gives the same messages, garbage is an error of ours."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from in_thread import in_thread

from lineshaft.base import errors
from lineshaft.base.errors import EngineError, LineshaftError, RequestError, TooLong
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Refused, Sampling, Score, Started
from lineshaft.serve.frames import Cancel, Failed, Frames, Orders, Ready, Step, Submit, ToEngine, ToServer, framed, revived
from lineshaft.serve.remote import RemoteEngine
from lineshaft.serve.spawn import spawn

NUMBERS, TEXTS = st.integers(0, 1 << 40), st.text(max_size=8)
NATS = st.floats(-50, 0)
SCORES = st.builds(Score, NATS, st.lists(st.tuples(NUMBERS, NATS), max_size=3).map(tuple))
EVENTS = st.one_of(
    st.builds(Started, NUMBERS, NUMBERS),
    st.builds(Emitted, NUMBERS, NUMBERS, st.sampled_from(["stop", "length", None]), st.none() | SCORES),
    st.builds(PromptScored, NUMBERS, st.lists(st.none() | SCORES, max_size=3)),
    st.builds(Pooled, NUMBERS, st.lists(st.floats(allow_nan=False), max_size=3)),
    st.builds(Refused, NUMBERS, TEXTS, TEXTS, st.none() | TEXTS),
)
LOADS = st.builds(Load, NUMBERS, NUMBERS, st.floats(0, 1), busy_seconds=st.floats(0, 1e6))
MESSAGES = st.one_of(
    st.builds(Ready, NUMBERS, NUMBERS, st.floats(0, 32), st.floats(0, 1e9), st.lists(TEXTS, max_size=2)),
    st.builds(Failed, TEXTS, TEXTS),
    st.builds(Step, st.lists(EVENTS, max_size=4), LOADS),
)


def received(pieces, kind=ToServer):
    """What is made of bytes that come in these pieces."""
    frames, messages = Frames(kind), []
    for piece in pieces:
        frames.feed(piece)
        while (message := frames.next()) is not None:
            messages.append(message)
    return messages


@given(messages=st.lists(MESSAGES, max_size=4), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_messages_come_out_as_they_went_in_however_their_bytes_are_split(messages, cuts):
    whole = b"".join(map(framed, messages))
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    assert received(whole[first:last] for first, last in pairwise(places)) == messages


@given(garbage=st.binary(min_size=1, max_size=80))
def test_garbage_is_an_error_of_ours_or_a_frame_that_is_not_complete_yet(garbage):
    try:
        received([garbage])
    except EngineError as error:
        assert "other process" in str(error)


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", framed({"type": "Step"}), framed(Cancel(3))], ids=range(4))
def test_a_frame_that_cannot_be_read_is_refused(garbage):
    with pytest.raises(EngineError, match="other process"):
        received([garbage])


def test_what_is_asked_for_crosses_with_every_field():
    sampling = Sampling(max_tokens=3, temperature=0.5, seed=-7, logit_bias={3: 1.5}, stop_token_ids=[1], logprobs=2)
    ask = Ask([1, 2, 3], sampling, "score", -4, 2)
    (message,) = received([framed(Submit.of([5, 6], ask))], ToEngine)
    assert (message.numbers, message.ask()) == ([5, 6], ask)


@pytest.mark.parametrize("name", [item.__name__ for item in vars(errors).values() if isinstance(item, type)])
def test_every_error_of_ours_comes_back_as_itself(name):
    error = revived(name, "why", "prompt")
    assert (type(error).__name__, str(error)) == (name, "why")
    assert not isinstance(error, RequestError) or error.param == "prompt"
    assert revived("TooLong", "x").status == TooLong.status


@pytest.mark.parametrize("name", ["SystemExit", "annotations", "no such thing"])
def test_no_other_class_is_made_by_its_name(name):
    assert type(revived(name, "x")) is EngineError
    assert issubclass(EngineError, LineshaftError)


CHILD = """
import socket, sys
connection = socket.socket(fileno=0)
connection.recv(1 << 16)
connection.sendall(bytes.fromhex(sys.argv[1]))
while connection.recv(1 << 16):
    continue
"""
DEAF = """
import socket, sys, time
connection = socket.socket(fileno=0)
connection.recv(1 << 16)
connection.sendall(bytes.fromhex(sys.argv[1]))
time.sleep(60)
"""
READY = framed(Ready(64, 0, 0.0, 0.0, []))


async def started(replies, child=CHILD, stall_seconds=20.0):
    remote = await RemoteEngine.spawned(Path(), EngineConfig(), stall_seconds, spawn([sys.executable, "-c", child, replies.hex()]))
    assert (await remote.wait_ready()).context_tokens == 64
    return remote


async def asked(prompt, *how, **settings):
    """Submit to a process that plays these replies; returns how it died, and what is left of it."""
    engine = await started(*how, **settings)
    engine.submit(Ask(prompt, Sampling()))
    try:
        while True:
            await engine.step()
    except EngineError as error:
        return str(error), engine.process.returncode
    finally:
        await engine.close()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", READY], ids=range(3))
def test_a_process_that_sends_garbage_is_killed(garbage):
    why, status = asyncio.run(asked([1], READY + garbage))
    assert "the engine process ended" in why
    assert status is not None


def test_a_process_that_takes_nothing_in_is_killed():
    why, status = asyncio.run(asked(list(range(300_000)), READY, DEAF, stall_seconds=0.2))
    assert "it said nothing for 0.2 s" in why
    assert status == -signal.SIGKILL


def test_a_large_frame_crosses_while_the_other_end_sends_as_well():
    pooled = Pooled(1, [0.5] * 300_000)

    async def exchange():
        served = await in_thread(lambda: LargeEngine(pooled))
        served.engine.submit(Ask(list(range(300_000)), Sampling(), "embed"))
        served.engine.submit(Ask(list(range(300_000)), Sampling(), "embed"))
        told = []
        while not served.engine.idle:
            told += await served.engine.step()
        await served.engine.close()
        return told

    assert asyncio.run(exchange()) == [pooled, Pooled(2, pooled.embedding)]


class LargeEngine(FakeEngine):
    """Answers each request with the same embedding."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled

    def _work(self, number, request):
        del self.requests[number]
        yield Pooled(number, self.pooled.embedding)


def test_a_process_that_cannot_be_started_is_an_error_of_ours():
    with pytest.raises(EngineError, match="could not be started"):
        spawn(["/no/such/program"])


def test_a_process_without_its_parent_loads_nothing():
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, subprocess.Popen([sys.executable, "-m", "lineshaft.serve.child"], stdin=theirs) as process:
            ours.sendall(framed(Orders("nowhere", {}, os.getppid())))
            assert process.wait(20) == 0
        assert ours.recv(1) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limit of open files")
def test_descriptors_above_1023_are_fine():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    held = []
    try:
        while len(held) < 1030:
            held.append(os.dup(0))
        step = framed(Step([Pooled(1, [])], Load()))
        why, _ = asyncio.run(asked([1], READY + step + b"\xff\xff\xff\xff"))
        assert "is no frame" in why
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
