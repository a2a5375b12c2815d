"""The engine's process as the server sees it: requests go in, events come out, all in the event loop.

Its death, however it comes, is an EngineError from `step`; the worker then fails the requests in flight and starts another.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from lineshaft.base.errors import EngineError
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Event, ends
from lineshaft.serve.frames import Cancel, Failed, Frames, Orders, Ready, Step, Submit, ToEngine, ToServer, framed, revived
from lineshaft.serve.spawn import Spawned

_PIECE = 1 << 20
_STRANGE = "it sent a frame that does not belong here"
_LAST_WORDS_S = 0.5
"""From the end of its socket to its own; its status is worth so long a wait."""
_END_SECONDS = 1.0
"""How long the process may take to end by itself when the socket is closed. It keeps nothing, so it may as well be killed."""
_POLL_S = 0.002
"""Between two looks at a process that is about to end."""


class RemoteEngine:
    """An engine at the other end of a socket. To be made and used inside one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stall_seconds: float) -> None:
        """`stall_seconds`: an engine that has work and says nothing for so long is given up."""
        self._reader, self._writer, self._stall_seconds = reader, writer, stall_seconds
        self._frames = Frames(ToServer)
        self._numbers = count(1)
        self._live: set[int] = set()
        self._load = Load()
        self._heard = time.monotonic()
        """When it last said something, or got work after it had none."""
        self._watch: asyncio.TimerHandle | None = None
        self._stalled = False
        self._ready: Ready | None = None
        self.process: subprocess.Popen[bytes] | None = None
        """None when it runs in a thread of ours, as in tests."""

    @classmethod
    async def connected(cls, connection: socket.socket, stall_seconds: float, folder: Path, config: EngineConfig) -> RemoteEngine:
        """The engine at the other end, which is told what to load. `wait_ready` waits for that."""
        remote = cls(*await asyncio.open_connection(sock=connection), stall_seconds)
        remote._send(Orders(str(folder.resolve()), config.model_dump(), os.getpid()))
        return remote

    @classmethod
    async def spawned(cls, folder: Path, config: EngineConfig, stall_seconds: float, spawned: Spawned) -> RemoteEngine:
        """The engine in a process of its own, which now belongs to this object."""
        remote = await cls.connected(spawned.connection, stall_seconds, folder, config)
        remote.process = spawned.process
        return remote

    async def wait_ready(self) -> Ready:
        """Wait until the model is loaded. Raises what loading raised, or EngineError when the process ended."""
        message = await self._message()
        if isinstance(message, Failed):
            await self.close()
            raise revived(message.error, message.message)
        if not isinstance(message, Ready):
            raise await self._death(_STRANGE)
        self._ready = message
        return message

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer."""
        assert self._ready
        return self._ready.context_tokens

    @property
    def idle(self) -> bool:
        """True when no request is in it."""
        return not self._live

    def load_now(self) -> Load:
        """How busy it was after its last step."""
        return self._load

    def submit(self, ask: Ask) -> list[int]:
        """Hand a request over; returns a number for each copy. What the engine thinks of it comes from `step`."""
        if self.idle:
            self._heard = time.monotonic()
        numbers = [next(self._numbers) for _ in range(ask.copies)]
        self._send(Submit.of(numbers, ask))
        self._live.update(numbers)
        if self._watch is None:
            self._look()
        return numbers

    def cancel(self, request: int) -> None:
        """Forget a request; nothing more comes for it."""
        if request in self._live:
            self._live.discard(request)
            self._send(Cancel(request))

    async def step(self) -> Sequence[Event]:
        """Wait for what the engine's next step gave. Raises EngineError when the process has ended, hangs or talks nonsense.

        To be called also when the engine is idle: its death is noticed here.
        """
        message = await self._message()
        if isinstance(message, Failed):
            raise await self._death(message.error)
        if not isinstance(message, Step):
            raise await self._death(_STRANGE)
        self._heard = time.monotonic()
        self._load = message.load
        told = [event for event in message.events if event.request in self._live]  # not of those that were cancelled meanwhile
        self._live -= {event.request for event in told if ends(event)}
        return told

    async def close(self) -> None:
        """End the process and see it gone. May be called again."""
        self._cut()
        if await self._status(_END_SECONDS) is None:
            await self._killed()

    def _send(self, message: ToEngine) -> None:
        if not self._writer.is_closing():  # else `step` is about to tell that it has gone
            self._writer.write(framed(message))  # one that takes nothing in is given up as stalled

    async def _message(self) -> ToServer:
        while True:
            try:
                message: ToServer | None = self._frames.next()
            except EngineError as error:
                raise await self._death(str(error)) from None
            if message is not None:
                return message
            try:
                received = await self._reader.read(_PIECE)
            except OSError:
                received = b""
            if not received:
                raise await self._death(f"it said nothing for {self._stall_seconds:g} s" if self._stalled else None)
            self._frames.feed(received)

    def _look(self) -> None:
        """Give up an engine that has work and has said nothing for too long; else look again when that could be so."""
        self._watch = None
        if self.idle:
            return
        left = self._heard + self._stall_seconds - time.monotonic()
        if left > 0:
            self._watch = asyncio.get_running_loop().call_later(left, self._look)
        else:
            self._stalled = True
            self._cut()

    def _cut(self) -> None:
        """Close our end. Whoever waits for a message sees the end of the connection."""
        if self._watch is not None:
            self._watch.cancel()
        self._writer.transport.abort()

    async def _death(self, why: str | None = None) -> EngineError:
        """Make sure that the process has ended, and say how. Without a `why` it closed the socket, and ends by itself as a rule."""
        self._cut()
        if why is None:
            await self._status(_LAST_WORDS_S)
        status = await self._killed()
        return EngineError(f"the engine process ended ({why or _how(status)})")

    async def _killed(self) -> int | None:
        if self.process is not None:
            self.process.kill()
        return await self._status(float("inf"))

    async def _status(self, seconds: float) -> int | None:
        """With what status it ended, which is waited for; None when it has not, or never was a process."""
        until = time.monotonic() + seconds
        while self.process is not None:
            status = self.process.poll()
            if status is not None or time.monotonic() >= until:
                return status
            await asyncio.sleep(_POLL_S)
        return None


def _how(status: int | None) -> str:
    if status is None:
        return "it closed the connection"
    return f"signal {-status}" if status < 0 else f"status {status}"
