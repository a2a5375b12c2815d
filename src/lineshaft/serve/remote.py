"""The engine's process as the server sees it: the same calls as an engine in this process, answered by frames.

Its death, however it comes, is an EngineError from `step`; the worker then fails the requests in flight and loads another.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from lineshaft.base.errors import EngineError
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Event, ends
from lineshaft.serve.frames import Cancel, Channel, Failed, Orders, Ready, Step, Submit, ToServer, revived

_END_SECONDS = 5.0
"""How long the process may take to end by itself when the socket is closed."""


class RemoteEngine:
    """An engine in a process of its own. Used by one thread, but for `wake` and `close`."""

    def __init__(self, folder: Path, config: EngineConfig, stall_seconds: float, command: Sequence[str] | None = None) -> None:
        """Starts the process; `wait_ready` waits for it.

        `stall_seconds`: an engine that has work and says nothing for so long is given up. `command`: what to run, with the
        number of the socket as its last argument; by default our own engine process.
        """
        ours, theirs = socket.socketpair()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._stall_seconds = stall_seconds
        with theirs:
            run = [*(command or [sys.executable, "-m", "lineshaft.serve.child"]), str(theirs.fileno())]
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                run, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._channel = Channel(ours, ToServer)
        self._numbers = count(1)
        self._live: set[int] = set()
        self._load = Load()
        self._channel.send(Orders(str(folder.resolve()), config.model_dump()))

    def wait_ready(self) -> Ready:
        """Wait until the model is loaded. Raises what loading raised, or EngineError when the process ended."""
        while (message := self._channel.buffered()) is None:
            if not self._fill():
                raise self._death()
        if isinstance(message, Failed):
            self.close()
            raise revived(message.error, message.message)
        assert isinstance(message, Ready)
        self.ready = message
        return message

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer."""
        return self.ready.context_tokens

    @property
    def idle(self) -> bool:
        """True when no request is in it."""
        return not self._live

    def submit(self, ask: Ask) -> list[int]:
        """Hand a request over; returns a number for each copy. What the engine thinks of it comes from `step`."""
        numbers = [next(self._numbers) for _ in range(ask.copies)]
        self._send(Submit.of(numbers, ask))
        self._live.update(numbers)
        return numbers

    def cancel(self, request: int) -> None:
        """Forget a request; nothing more comes for it."""
        if request in self._live:
            self._live.discard(request)
            self._send(Cancel(request))

    def step(self) -> Sequence[Event]:
        """Wait for what the engine's next step gave, or until `wake`. Raises EngineError when the process has ended or hangs."""
        silent_until = time.monotonic() + self._stall_seconds
        while (message := self._channel.buffered()) is None:
            sources = [self._channel.socket, self._woken]
            readable = select.select(sources, [], [], max(0.0, silent_until - time.monotonic()))[0]
            if self._woken in readable:
                self._woken.recv(1 << 16)
                return []
            if not readable:
                raise self._death(f"it said nothing for {self._stall_seconds:g} s")
            if not self._fill():
                raise self._death()
        if not isinstance(message, Step):
            raise self._death("it sent a frame that does not belong here")
        self._load = message.load
        told = [event for event in message.events if event.request in self._live]  # not of those that were cancelled meanwhile
        self._live -= {event.request for event in told if ends(event)}
        return told

    def load_now(self) -> Load:
        """How busy it was after its last step."""
        return self._load

    def wake(self) -> None:
        """Let `step` return at once, for another thread has something to hand over."""
        with suppress(OSError):  # full: so many wake-ups wait already that one more says nothing; closed: nobody waits any more
            self._waker.send(b"!")

    def close(self) -> None:
        """End the process. May be called again."""
        for end in (self._channel.socket, self._waker, self._woken):
            end.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: Submit | Cancel) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise self._death() from None

    def _fill(self) -> bool:
        try:
            return self._channel.fill()
        except OSError:
            return False

    def _death(self, why: str | None = None) -> EngineError:
        """Make sure that the process has ended, and say how."""
        self.process.kill()
        self._channel.socket.close()
        status = self.process.wait()
        return EngineError(f"the engine process ended ({why or _how(status)})")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
