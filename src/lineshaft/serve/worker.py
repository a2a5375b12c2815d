"""The thread that owns the engine.

The event loop hands requests in through an inbox and gets what they are told back in an asyncio queue for each. Only the
thread uses the engine, which runs in a process of its own (remote.py). When the engine fails, or its process dies,
every request in flight gets an error and a fresh engine is loaded, so the service lives on; requests that come in the
meantime wait for it. Nobody is left waiting for what will not come.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lineshaft.base.errors import Capacity, EngineError, LineshaftError, QueueFull
from lineshaft.base.terminal import say
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Refused, Started
from lineshaft.sched.request import Event as Told
from lineshaft.serve.frames import revived
from lineshaft.serve.ledger import Ledger, Times
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.refusals import not_ready
from lineshaft.serve.served import Engine, Served

State = Literal["loading", "ready", "restarting", "draining", "failed", "stopped"]
Event: TypeAlias = Told | LineshaftError
MOST_FRUITLESS = 3
"""Engines that may die one after the other before they have done a step; then the server gives up."""
_REASONS = {
    "loading": "the model is being loaded: try again later",
    "restarting": "the engine is being started again after a failure: try again later",
    "draining": "the server is stopping and takes no new requests",
    "failed": "the engine could not be loaded again after a failure",
    "stopped": "the server has stopped",
}


@dataclass(eq=False)
class Ticket:
    """One answer on its way through the engine. Made by `Worker.submit`, given back by `Worker.release`."""

    ask: Ask
    times: Times
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    number: int = -1
    """The engine's number for it."""
    waits: bool = True
    """No step has worked on it yet."""
    cached_tokens: int = 0
    """Tokens of its prompt that were found in the prefix cache."""
    answered: bool = False
    """Its answer is complete; the engine need not go on after a stop string."""
    ended: bool = False
    """Nothing more will come for it."""

    async def next(self) -> Told:
        """What comes next for it, a token as a rule. Raises the LineshaftError that ended it."""
        event = await self.events.get()
        if isinstance(event, LineshaftError):
            raise event
        return event


class Worker:
    """Runs the engine in a thread. All public methods are for the event loop's thread."""

    def __init__(
        self, load: Callable[[], Served], metrics: Metrics, max_waiting: int, on_ready: Callable[[float], None] = lambda _: None
    ) -> None:
        """`load` makes the model, now and after each failure; `on_ready` is told how many seconds that took."""
        self._load, self._on_ready = load, on_ready
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        """Guards state, inbox, cancelled and the number of waiting requests; notified when the thread has something to do."""
        self._state: State = "loading"
        self._inbox: deque[list[Ticket]] = deque()
        self._cancelled: list[Ticket] = []
        self._waiting = 0
        self._live: dict[int, Ticket] = {}
        """Requests inside the engine, in the order they went in. The thread's own."""
        self._open: set[Ticket] = set()
        """Tickets not yet given back. The event loop's own."""
        self._served: Served | None = None
        """The latest; it stays while another is being loaded, whose context and tokenizer are the same."""
        self._fruitless = 0
        self._loading = True
        self.failure: Exception | None = None
        """Why loading failed; the server can't go on after that."""
        self._ledger = Ledger(metrics, lambda: self._waiting)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- the event loop's side --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model. Call it inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def state(self) -> State:
        """Where its life stands; it takes requests when `ready`, and when `restarting`."""
        return self._state

    @property
    def in_flight(self) -> int:
        """Tickets not yet given back."""
        return len(self._open)

    @property
    def context_tokens(self) -> int | None:
        """Of the model loaded, or None."""
        return self._served.engine.context_tokens if self._served else None

    def model(self) -> Served:
        """The model that requests are taken in for. Raises Capacity (503) with the reason when none are."""
        served = self._served
        if self._state not in ("ready", "restarting") or served is None:
            raise self._refusal()
        return served

    def must_be_ready(self) -> None:
        """Raises Capacity (503) with the reason unless there is an engine at work now."""
        if self._state != "ready":
            raise self._refusal()

    def submit(self, ask: Ask, arrived: float) -> list[Ticket]:
        """Hand a request in; a ticket for each copy. `arrived` is a time of `time.monotonic`. Raises Capacity (503) or QueueFull."""
        tickets = [Ticket(ask, Times(arrived)) for _ in range(ask.copies)]
        with self._changed:
            if self._state not in ("ready", "restarting"):  # under the lock: whoever empties the inbox for good changes the state first
                raise self._refusal()
            if self._waiting and self._waiting + len(tickets) > self._max_waiting:  # many copies may come alone
                raise QueueFull(self._waiting)
            self._waiting += len(tickets)
            self._inbox.append(tickets)
            self._notify()
        self._open.update(tickets)
        return tickets

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back; a request that has not ended is cancelled. May be called again."""
        self._open.discard(ticket)
        with self._changed:
            if not ticket.ended:
                self._cancelled.append(ticket)
                self._notify()

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        with self._changed:
            if self._state in ("loading", "ready", "restarting"):
                self._state = "draining"

    def stop(self) -> None:
        """End the thread after its present step; requests still in flight get an error."""
        with self._changed:
            self._state = "stopped"
            self._notify()

    async def join(self, seconds: float) -> None:
        """Wait for the thread to end, at most so long: a model that is still loading is not waited for."""
        if not self._loading:
            await asyncio.to_thread(self._thread.join, seconds)

    def _notify(self) -> None:
        """Let the thread look, also when it waits for an engine elsewhere. Call it with the lock held."""
        self._changed.notify()
        if self._served is not None and (wake := getattr(self._served.engine, "wake", None)) is not None:
            wake()

    # -- the thread's side ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._state != "stopped":
                self._serve_until_failure()
        except Exception as error:  # handed over to the thread that can end the process
            self.failure = error
            self._become("failed")
        self._end_all(self._refusal)

    def _serve_until_failure(self) -> None:
        """Load an engine and work with it until the server stops or the engine raises."""
        began = time.monotonic()
        again = self._served is not None
        self._loading = True
        served = self._load()
        self._loading, self._served = False, served
        self._ledger.loaded(again)
        self._ledger.engine_process = getattr(getattr(self._served.engine, "process", None), "pid", None)
        self._become("ready")
        self._on_ready(time.monotonic() - began)
        try:
            self._work(self._served.engine)
        except Exception as error:  # whatever it was, the engine's state can't be trusted any more
            self._give_up(error)
        finally:
            if (close := getattr(self._served.engine, "close", None)) is not None:
                close()

    def _give_up(self, error: Exception) -> None:
        """Tell everybody in flight, and those who come from now on to wait. Raises when another engine would fare no better."""
        if not isinstance(error, EngineError):
            traceback.print_exc(file=sys.stderr)
        name = type(error).__name__ if not isinstance(error, EngineError) else str(error)
        with self._changed:
            self._become("restarting")
            tickets = self._all_taken()
        say(f"the engine failed ({name}), {len(tickets)} requests end with an error; loading it again")
        self._end_with(tickets, lambda: EngineError(f"the engine failed while it worked on this request ({name}): it may be sent again"))
        self._ledger.lost()
        self._fruitless += 1
        if self._fruitless >= MOST_FRUITLESS:
            raise EngineError(f"{self._fruitless} engines in a row failed before they had done a step: {name}")

    def _become(self, state: State) -> None:
        with self._changed:
            if state == "failed" or self._state in ("loading", "ready", "restarting"):  # a server that stops does not become ready again
                self._state = state

    def _refusal(self) -> Capacity:
        return not_ready(_REASONS.get(self._state, _REASONS["loading"]))

    def _work(self, engine: Engine) -> None:
        attentive = hasattr(engine, "wake")  # one elsewhere: its `step` waits by itself, and notices when its process dies idle
        while True:
            with self._changed:
                self._changed.wait_for(lambda: attentive or self._state == "stopped" or self._inbox or self._cancelled or not engine.idle)
                if self._state == "stopped":
                    return
                cancelled, self._cancelled = self._cancelled, []
            self._admit(engine)
            self._cancel(engine, cancelled)
            before = engine.load_now()
            told = engine.step()
            if told or engine.load_now().step_began != before.step_began:
                self._fruitless = 0
            self._hand_out(told, engine, time.monotonic())

    def _admit(self, engine: Engine) -> None:
        while self._inbox:
            tickets = self._inbox[0]  # they stay there until the engine has them, so that a failure finds them
            try:
                numbers = engine.submit(tickets[0].ask)
            except EngineError:
                raise
            except LineshaftError as error:
                self._end_with(tickets, lambda error=error: error)  # type: ignore[misc]  # mypy does not infer lambdas with defaults
            else:
                for ticket, number in zip(tickets, numbers, strict=True):
                    ticket.number = number
                    self._live[number] = ticket
            self._inbox.popleft()

    def _cancel(self, engine: Engine, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if not ticket.ended:
                engine.cancel(ticket.number)
                self._end(ticket, "stop" if ticket.answered else "abort")

    def _hand_out(self, told: Sequence[Told], engine: Engine, now: float) -> None:
        load = engine.load_now()
        events: list[tuple[Ticket, Event]] = []
        for item in told:
            ticket = self._live.get(item.request)
            if ticket is None:
                continue  # cancelled
            self._note_start(ticket, item, load.step_began or now)
            if isinstance(item, Emitted):
                self._ledger.token(ticket.times, now)
                if item.finish:
                    self._end(ticket, item.finish)
            elif isinstance(item, Pooled):
                self._end(ticket, "stop")
            elif isinstance(item, Refused):
                self._end(ticket, "error")
            if not isinstance(item, Started):
                events.append((ticket, revived(item.error, item.message, item.param) if isinstance(item, Refused) else item))
        self._ledger.stepped(load, sum(isinstance(item, Emitted) for item in told))
        self._post(events)

    def _note_start(self, ticket: Ticket, item: Told, began: float) -> None:
        if isinstance(item, Started):
            ticket.cached_tokens = item.cached
        if ticket.waits and isinstance(item, Started | Emitted | PromptScored | Pooled):
            self._no_longer_waits(ticket)
            self._ledger.started(ticket.times, began, len(ticket.ask.prompt))

    def _end(self, ticket: Ticket, reason: str) -> None:
        ticket.ended = True
        self._no_longer_waits(ticket)
        self._live.pop(ticket.number, None)
        self._ledger.ended(ticket.times, reason)

    def _no_longer_waits(self, ticket: Ticket) -> None:
        if ticket.waits:
            ticket.waits = False
            with self._changed:
                self._waiting -= 1

    def _all_taken(self) -> list[Ticket]:
        """Everybody in the engine or before its door; the inbox is empty afterwards."""
        with self._changed:
            tickets = [*self._live.values(), *(ticket for waiting in self._inbox for ticket in waiting)]
            self._inbox.clear()
        return tickets

    def _end_all(self, why: Callable[[], LineshaftError]) -> None:
        """Answer everybody with an error. The state must be one that lets nobody in any more."""
        self._end_with(self._all_taken(), why)

    def _end_with(self, tickets: Sequence[Ticket], why: Callable[[], LineshaftError]) -> None:
        for ticket in tickets:
            self._end(ticket, "error")
            self._post([(ticket, why())])

    def _post(self, events: list[tuple[Ticket, Any]]) -> None:
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
