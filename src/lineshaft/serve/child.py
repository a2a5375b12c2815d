"""`python -m lineshaft.serve.child FD`: the engine's own process, which a server starts and talks to over a socket.

It loads the model, warms it up, then takes requests in and runs steps until the server closes the socket, which also
happens when the server dies. An engine that raises ends the process: its state can't be trusted. The server sees the end
of the socket, tells everybody, and starts another.
"""

from __future__ import annotations

import ctypes
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from lineshaft.base.config import load as load_config
from lineshaft.base.errors import LineshaftError, RequestError
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.request import Event, Refused, ends
from lineshaft.serve.frames import Cancel, Channel, Failed, Orders, Ready, Step, Submit, ToEngine
from lineshaft.serve.served import Engine

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's <sys/prctl.h>: end with the server even while a step or a load takes long."""


def serve_engine(channel: Channel, load: Callable[[Orders], tuple[Engine, Ready]]) -> None:
    """Load what is ordered and work for the other end of the channel until it closes. Raises what the engine raises."""
    orders = _next(channel)
    if not isinstance(orders, Orders):
        return
    try:
        engine, ready = load(orders)
    except LineshaftError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return
    channel.send(ready)
    _Service(channel, engine).run()


class _Service:
    """Requests by the server's numbers, worked on by an engine with numbers of its own."""

    def __init__(self, channel: Channel, engine: Engine) -> None:
        self._channel, self._engine = channel, engine
        self._theirs: dict[int, int] = {}
        """Our engine's number to the server's."""
        self._ours: dict[int, int] = {}
        self._refused: list[Refused] = []

    def run(self) -> None:
        while self._take_in():
            events = [told for event in self._engine.step() if (told := self._renumbered(event)) is not None]
            if events or self._refused:
                self._channel.send(Step([*self._refused, *events], self._engine.load_now()))
                self._refused = []

    def _take_in(self) -> bool:
        """Carry out what has come; waits for something when there is nothing to do. False when the server has gone."""
        while True:
            while (message := self._channel.buffered()) is not None:
                self._obey(message)
            waits = self._engine.idle and not self._refused
            if not waits and not select.select([self._channel.socket], [], [], 0)[0]:
                return True
            if not self._channel.fill():
                return False

    def _obey(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            try:
                numbers = self._engine.submit(message.ask())
            except LineshaftError as error:
                param = error.param if isinstance(error, RequestError) else None
                self._refused += [Refused(number, type(error).__name__, str(error), param) for number in message.numbers]
                return
            self._ours |= dict(zip(message.numbers, numbers, strict=True))
            self._theirs |= dict(zip(numbers, message.numbers, strict=True))
        elif isinstance(message, Cancel) and message.number in self._ours:
            own = self._ours.pop(message.number)
            del self._theirs[own]
            self._engine.cancel(own)

    def _renumbered(self, event: Event) -> Event | None:
        number = self._theirs.get(event.request)
        if number is None:
            return None
        if ends(event):
            del self._theirs[event.request], self._ours[number]
        return msgspec.structs.replace(event, request=number)


def _next(channel: Channel) -> ToEngine | None:
    while (message := channel.buffered()) is None:
        if not channel.fill():
            return None
    order: ToEngine = message
    return order


def load_engine(orders: Orders) -> tuple[Engine, Ready]:
    """The engine that was ordered, warm. Raises what loading raises: DoesNotFit, BrokenContract, ModelError, ConfigError."""
    from lineshaft.serve import loading  # torch: not before the death of the parent is arranged for

    return loading.loaded(Path(orders.folder), load_config(EngineConfig, orders.engine))


def main() -> int:
    """Work for the server at the other end of the socket that is file descriptor sys.argv[1]."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too, and is the server's to answer
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            serve_engine(Channel(connection, ToEngine), load_engine)
        except (BrokenPipeError, ConnectionResetError):
            say("the server has gone; its engine process ends")
    return 0


if __name__ == "__main__":
    sys.exit(main())
