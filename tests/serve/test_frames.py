"""The frames between server and engine process: any split of bytes gives the same messages, garbage is an error of ours."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base import errors
from lineshaft.base.errors import EngineError, LineshaftError, RequestError, TooLong
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Refused, Sampling, Score, Started
from lineshaft.serve.frames import Cancel, Channel, Failed, Orders, Ready, Step, Submit, ToEngine, ToServer, revived
from lineshaft.serve.remote import RemoteEngine

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
    """What a channel makes of bytes that come in these pieces."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, messages = Channel(ours, kind), []
        for piece in filter(None, pieces):
            theirs.sendall(piece)
            channel.fill()
            while (message := channel.buffered()) is not None:
                messages.append(message)
        return messages


def exchange(channel, message):
    """Send one and take one in."""
    channel.send(message)
    while (found := channel.buffered()) is None:
        assert channel.fill()
    return found


def framed(*messages):
    bodies = [msgspec.msgpack.encode(message) for message in messages]
    return b"".join(len(body).to_bytes(4, "big") + body for body in bodies)


@given(messages=st.lists(MESSAGES, max_size=4), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_messages_come_out_as_they_went_in_however_their_bytes_are_split(messages, cuts):
    whole = framed(*messages)
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


def test_a_large_frame_crosses_while_the_other_end_sends_as_well():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ends = [Channel(ours, ToServer), Channel(theirs, ToEngine)]
        large = Submit([1], list(range(300_000)), {}, "generate", 0), Step([Pooled(1, [0.5] * 300_000)], Load())
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(exchange, ends, large))
        assert found == [*reversed(large)]


def test_an_end_that_takes_nothing_in_is_given_up():
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        Channel(ours, ToServer).send(Submit([1], list(range(300_000)), {}, "generate", 0), seconds=0.05)


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
connection = socket.socket(fileno=int(sys.argv[-1]))
connection.recv(1 << 16)
connection.sendall(bytes.fromhex(sys.argv[1]))
while connection.recv(1 << 16):
    continue
"""


def started(replies):
    return RemoteEngine(Path(), EngineConfig(), 20.0, [sys.executable, "-c", CHILD, replies.hex()])


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", framed(Ready(1, 1, 1.0, 1.0, []))], ids=range(3))
def test_a_process_that_sends_garbage_is_killed(garbage):
    engine = started(framed(Ready(64, 0, 0.0, 0.0, [])) + garbage)
    assert engine.wait_ready().context_tokens == 64
    engine.submit(Ask([1], Sampling()))
    with pytest.raises(EngineError, match="the engine process ended"):
        engine.step()
    assert engine.process.returncode is not None
    engine.close()


def test_a_process_without_its_parent_loads_nothing():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "lineshaft.serve.child", str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL) as process:
            Channel(ours, ToServer).send(Orders("nowhere", {}, os.getppid()))
            assert process.wait(20) == 0
            theirs.close()
            assert ours.recv(1) == b""
