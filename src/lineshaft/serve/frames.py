"""What the server and its engine process say to each other: MessagePack frames with their length before them, over a socket.

Both ends are ours and of one version; a frame that can't be read means that the other end is broken.
"""

from __future__ import annotations

import select
import socket
from typing import Any, TypeAlias

import msgspec

from lineshaft.base import errors
from lineshaft.base.errors import EngineError, LineshaftError
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Refused, Sampling, Started

MOST_BYTES = 1 << 28
"""A longer frame is taken for garbage. Scores of a whole long prompt are the largest that is ever sent, some megabytes."""
_HEAD = 4
_PIECE = 1 << 16
"""Sent at a time: a socket that takes some bytes may block on many."""


class Orders(msgspec.Struct, tag=True):
    """What the engine process is to load; the first frame it gets. `engine`: the settings as a table."""

    folder: str
    engine: dict[str, Any]
    parent: int
    """The server's process; one that finds itself with another parent has been left alone before it could notice."""


class Submit(msgspec.Struct, tag=True):
    """Take a request in. `numbers`: one for each copy; they ascend. `sampling`: as a table."""

    numbers: list[int]
    prompt: list[int]
    sampling: dict[str, Any]
    task: str
    priority: int

    @classmethod
    def of(cls, numbers: list[int], ask: Ask) -> Submit:
        """The frame for an Ask."""
        return cls(numbers, ask.prompt, ask.sampling.model_dump(), ask.task, ask.priority)

    def ask(self) -> Ask:
        """The Ask again."""
        sampling = Sampling.model_validate(self.sampling)
        return Ask(self.prompt, sampling, self.task, self.priority, len(self.numbers))  # type: ignore[arg-type]  # checked at the other end


class Cancel(msgspec.Struct, tag=True):
    """Forget a request."""

    number: int


class Ready(msgspec.Struct, tag=True):
    """The model is loaded and warm."""

    context_tokens: int
    weight_bytes: int
    bits_per_weight: float
    kv_bytes_per_token: float
    told: list[str]
    """Lines for whoever started the server."""


class Failed(msgspec.Struct, tag=True):
    """The model could not be loaded, or a step raised; the process ends."""

    error: str
    """Name of the class: of loading one in base/errors.py, of a step any."""
    message: str


class Step(msgspec.Struct, tag=True):
    """What one step gave, and how busy the engine is after it. One for each step, also when it gave nothing: silence means trouble."""

    events: list[Started | Emitted | PromptScored | Pooled | Refused]
    load: Load


ToEngine: TypeAlias = Orders | Submit | Cancel
ToServer: TypeAlias = Ready | Failed | Step


def framed(message: ToEngine | ToServer) -> bytes:
    """A message as it goes over the socket."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_HEAD, "big") + body


class Frames:
    """Makes messages of bytes, however those were split. `kind`: the union of what comes in."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, received: bytes) -> None:
        """Take in what has come."""
        self._buffer += received

    def next(self) -> Any:
        """The next message, or None as long as it is not complete. Raises EngineError for what can't be read."""
        if len(self._buffer) < _HEAD:
            return None
        size = int.from_bytes(self._buffer[:_HEAD], "big")
        if size > MOST_BYTES:
            raise EngineError(f"a frame of {size} bytes came from the other process, which is no frame")
        if len(self._buffer) < _HEAD + size:
            return None
        body = bytes(self._buffer[_HEAD : _HEAD + size])
        del self._buffer[: _HEAD + size]
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"the other process sent what can't be read: {error}") from None


class Channel:
    """The engine's end of the socket. The server's is in remote.py, inside an event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._frames = Frames(ToEngine)

    def send(self, message: ToServer) -> None:
        """Raises OSError when the other end has gone. Waits as long as it takes nothing in."""
        rest = memoryview(framed(message))
        while rest:  # both ends may be sending: who can't go on takes in what has come, or they would wait for each other
            readable, writable, _ = select.select([self.socket], [self.socket], [])
            if readable and not self.fill():
                raise BrokenPipeError("the other process has closed the connection")
            if writable:
                rest = rest[self.socket.send(rest[:_PIECE]) :]

    def buffered(self) -> ToEngine | None:
        """The next message that has come already, or None. Raises EngineError for one that can't be read."""
        message: ToEngine | None = self._frames.next()
        return message

    def fill(self) -> bool:
        """Take in what has come, waiting for the first byte. False at the end of the connection."""
        received = self.socket.recv(1 << 20)
        self._frames.feed(received)
        return bool(received)


def revived(name: str, message: str, param: str | None = None) -> LineshaftError:
    """An error of ours that was raised in the other process, by the name of its class."""
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, LineshaftError)):
        kind = EngineError
    error: LineshaftError = kind.__new__(kind, message)  # some make their text from other arguments
    error.args = (message,)
    if isinstance(error, errors.RequestError):
        error.param = param
    return error
