"""`python -m lineshaft.serve.child`: the engine's own process, which a server starts and talks to over the socket on its stdin.

It loads the model, warms it up, then takes requests in and runs steps until the server closes the socket, which also
happens when the server dies. An engine that raises ends the process: its state can't be trusted. The server sees the end
of the socket, tells everybody, and starts another.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec

from lineshaft.base.caches import cache_root
from lineshaft.base.config import load as load_config
from lineshaft.base.errors import LineshaftError, RequestError
from lineshaft.base.pages import expect, have_read, leave_rest
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.starts.key import any_kept
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Event, Refused, ends
from lineshaft.serve.frames import Cancel, Channel, Failed, Orders, Ready, Step, Submit, ToEngine

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's <sys/prctl.h>: end with the server even while a step or a load takes long."""

_ENVIRONMENT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Read when torch is loaded; whoever sets them decides. Products in bfloat16 are compiled for each number of rows, by oneDNN and again
by PyTorch's layer over it, which keep 1024 each: with steps of all sizes that took 180 MB within three minutes. Fewer cost about half a
millisecond a step (docs/log.md)."""


class Engine(Protocol):
    """What is needed of an engine."""

    @property
    def idle(self) -> bool:
        """True when `step` has nothing to do."""

    def submit(self, ask: Ask) -> list[int]:
        """Take a request in; returns a number for each copy. Raises RequestError or Capacity."""

    def cancel(self, request: int) -> None:
        """Forget a request and free its pages."""

    def step(self) -> Sequence[Event]:
        """Do one round of work."""

    def load_now(self) -> Load:
        """How busy it is."""


def serve_engine(channel: Channel, load: Callable[[Orders], tuple[Engine, Ready]]) -> None:
    """Load what is ordered and work for the other end of the channel until it closes, or until the engine raises."""
    orders = _next(channel)
    if not isinstance(orders, Orders) or orders.parent not in (os.getppid(), os.getpid()):  # the second: a thread of a test
        return
    try:
        engine, ready = load(orders)
    except LineshaftError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return
    channel.send(ready)
    try:
        _Service(channel, engine).run()
    except OSError:  # the server has gone, and hears nothing any more
        raise
    except Exception as error:  # whatever it was, the engine's state can't be trusted any more: the process ends
        traceback.print_exc(file=sys.stderr)
        channel.send(Failed(type(error).__name__, ""))  # its text may hold what was asked


class _Service:
    """Requests by the server's numbers, worked on by an engine with numbers of its own."""

    def __init__(self, channel: Channel, engine: Engine) -> None:
        self._channel, self._engine = channel, engine
        self._theirs: dict[int, int] = {}
        """Our engine's number to the server's."""
        self._ours: dict[int, int] = {}
        self._refused: list[Refused] = []
        self._news = False
        """Something to tell also when there is no step to run: a refusal, or pages that were freed."""

    def run(self) -> None:
        while self._take_in():
            events = [told for event in self._engine.step() if (told := self._renumbered(event)) is not None]
            self._channel.send(Step([*self._refused, *events], self._engine.load_now()))
            self._refused, self._news = [], False

    def _take_in(self) -> bool:
        """Carry out what has come; waits for something when there is nothing to do. False when the server has gone."""
        while True:
            while (message := self._channel.buffered()) is not None:
                self._obey(message)
            waits = self._engine.idle and not self._news
            if not waits and not select.select([self._channel.socket], [], [], 0)[0]:
                return True
            if not self._channel.fill():
                return False

    def _obey(self, message: ToEngine) -> None:
        self._news = True
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
    return message


def load_engine(orders: Orders) -> tuple[Engine, Ready]:
    """The engine that was ordered, warm: one whose start was kept, else a new one. Raises what loading raises: DoesNotFit, ModelError,
    ConfigError, Corrupt."""
    folder, config = Path(orders.folder), load_config(EngineConfig, orders.engine)
    _prepared.wait()
    if any_kept(folder) or "lineshaft.serve.reopening" in sys.modules:  # the second: another one was opened ahead, and goes
        from lineshaft.serve import reopening

        if (found := reopening.reopened(folder, config)) is not None:
            return found
    expect(folder, copied=_packs(orders))  # while `import_engine` is at it
    from lineshaft.serve import loading  # waits for it

    return loading.loaded(folder, config)


def _packs(orders: Orders) -> bool:
    """Will weights be laid out anew (engine/packing.py)? As far as that can be told without torch."""
    native = importlib.util.find_spec("lineshaft._native") is not None and os.environ.get("LINESHAFT_ISA") != "none"
    return native and bool(orders.engine.get("batch_invariant", True))


def _settled(loaded: tuple[Engine, Ready]) -> tuple[Engine, Ready]:
    """Memory that was not needed goes back; from here on garbage is collected, but not looked for among what is there now."""
    leave_rest()
    gc.freeze()
    gc.enable()
    return loaded


_prepared = threading.Event()
"""A start that was kept has been opened, or none is expected."""


def import_engine() -> None:
    """Import what an engine needs, without knowing which: orders may take as long to come. Torch only where no start was kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hint = sys.argv[1:]
    try:
        if _opened_ahead(hint):
            return
    finally:
        _prepared.set()
    if hint:  # where it is a folder: reading it from the disk may take as long as the imports
        threading.Thread(target=have_read, args=(Path(hint[0]),), name="reading ahead", daemon=True).start()
    importlib.import_module("lineshaft.serve.loading")


def _opened_ahead(hint: list[str]) -> bool:
    """Is a kept start expected, and so opened? `hint`: what names the checkpoint, if that is known yet. A wrong guess costs some tenths
    of a second."""
    if not hint:
        return False
    folder = Path(hint[0])
    with suppress(OSError, RuntimeError, ValueError):  # no path at all, or no cache
        if not (any_kept(folder) if folder.is_dir() else any(cache_root().glob("starts/*"))):
            return False
        from lineshaft.serve import reopening

        with suppress(LineshaftError):  # who orders this checkpoint is told
            reopening.open_ahead(folder)
        return True
    return False


def main(load: Callable[[Orders], tuple[Engine, Ready]] = load_engine, prepare: Callable[[], None] = import_engine) -> int:
    """Work for the server at the other end of the socket that is our stdin. `prepare` runs beside it, from the start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, or systemd, may reach the whole group; how to end is the server's to say
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as connection, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # held by a process that we start, it would hide our death
        gc.disable()  # collecting takes a fifth of the time that importing torch does, and finds nothing
        threading.Thread(target=prepare, name="imports").start()
        try:
            serve_engine(Channel(connection), lambda orders: _settled(load(orders)))
        except (BrokenPipeError, ConnectionResetError):
            say("the server has gone; its engine process ends")
    return 0


def _end(status: int) -> NoReturn:
    """End at once. An orderly end would wait for imports that still run, whose libraries then complain that it is too late."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main())
