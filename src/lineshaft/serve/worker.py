"""Requests on their way through the engine, and the life of that engine.

Everything happens in the event loop: requests are handed to the engine's process (remote.py), one task waits for what its
steps give and puts it into an asyncio queue for each request. When the engine fails, or its process dies, every request
in it gets an error and a fresh engine is started, so the service lives on; requests that come in the meantime wait for
it. Nobody is left waiting for what will not come.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lineshaft.base.errors import Capacity, EngineError, LineshaftError, QueueFull
from lineshaft.base.terminal import say
from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Refused, Started
from lineshaft.sched.request import Event as Told
from lineshaft.serve.frames import revived
from lineshaft.serve.ledger import Ledger, Times
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.refusals import not_ready
from lineshaft.serve.remote import RemoteEngine
from lineshaft.serve.served import Served

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
    """Owns the engine. To be used inside one event loop."""

    def __init__(
        self, start: Callable[[], Awaitable[Served]], metrics: Metrics, max_waiting: int, on_ready: Callable[[float], None] = lambda _: None
    ) -> None:
        """`start` starts an engine, now and after each failure; `on_ready` is told how many seconds that took."""
        self._start, self._on_ready = start, on_ready
        self._max_waiting = max_waiting
        self._state: State = "loading"
        self._inbox: list[list[Ticket]] = []
        """Requests that wait for an engine to be there."""
        self._engine: RemoteEngine | None = None
        """The one at work now."""
        self._served: Served | None = None
        """The latest; it stays while another is being started, whose context and tokenizer are the same."""
        self._live: dict[int, Ticket] = {}
        """Requests inside the engine, in the order they went in."""
        self._open: set[Ticket] = set()
        """Tickets not yet given back."""
        self._waiting = 0
        self._fruitless = 0
        self.failure: Exception | None = None
        """Why no engine can be started; the server can't go on after that."""
        self._ledger = Ledger(metrics, lambda: self._waiting)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load the model. Call it inside the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="engine")

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
        if self._state not in ("ready", "restarting") or self._served is None:
            raise self._refusal()
        return self._served

    def must_be_ready(self) -> None:
        """Raises Capacity (503) with the reason unless there is an engine at work now."""
        if self._state != "ready":
            raise self._refusal()

    def submit(self, ask: Ask, arrived: float) -> list[Ticket]:
        """Hand a request in; a ticket for each copy. `arrived` is a time of `time.monotonic`. Raises Capacity (503) or QueueFull."""
        if self._state not in ("ready", "restarting"):
            raise self._refusal()
        tickets = [Ticket(ask, Times(arrived)) for _ in range(ask.copies)]
        if self._waiting and self._waiting + len(tickets) > self._max_waiting:  # many copies may come alone
            raise QueueFull(self._waiting)
        self._waiting += len(tickets)
        self._open.update(tickets)
        if self._engine is None:
            self._inbox.append(tickets)
        else:
            self._hand_in(self._engine, tickets)
        return tickets

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back; a request that has not ended is cancelled. May be called again."""
        self._open.discard(ticket)
        if not ticket.ended:
            if self._engine is not None and ticket.number in self._live:
                self._engine.cancel(ticket.number)
            self._end(ticket, "stop" if ticket.answered else "abort")
            self._inbox = [tickets for tickets in self._inbox if not all(item.ended for item in tickets)]

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self._become("draining")

    def stop(self) -> None:
        """End the engine; requests still in flight get an error. May be called again."""
        if self._task is not None and self._state != "stopped":  # cancelled twice, it would not wait for the engine's end
            self._task.cancel()
        self._state = "stopped"

    async def join(self, seconds: float) -> None:
        """Wait for the engine to end, at most so long."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)

    async def _run(self) -> None:
        try:
            while self._state != "draining" or self._served is None:  # a failure while it drains leaves nobody for another engine
                await self._serve_until_failure()
        except Exception as error:  # handed over to the server, which ends the process
            self.failure = error
            self._state = "failed"
        finally:
            self._end_with(self._all_taken(), self._refusal)

    async def _serve_until_failure(self) -> None:
        """Start an engine and work with it until it fails."""
        began, again = time.monotonic(), self._served is not None
        self._served = await self._start()
        engine = self._served.engine
        try:
            self._ledger.loaded(again, engine.process.pid if engine.process else None)
            self._take_up(engine)
            self._on_ready(time.monotonic() - began)
            while True:
                self._hand_out(await engine.step(), engine.load_now(), time.monotonic())
        except Exception as error:  # whatever it was, the engine's state can't be trusted any more
            self._give_up(error)
        finally:
            self._engine = None
            self._end_with(self._all_taken(), self._refusal)  # before the engine's end is waited for
            await engine.close()

    def _take_up(self, engine: RemoteEngine) -> None:
        """Work with this engine from now on."""
        self._engine = engine
        self._become("ready")
        waiting, self._inbox = self._inbox, []
        for tickets in waiting:
            self._hand_in(engine, tickets)

    def _give_up(self, error: Exception) -> None:
        """Tell everybody in flight, and those who come from now on to wait. Raises when another engine would fare no better."""
        if not isinstance(error, EngineError):
            traceback.print_exc(file=sys.stderr)
        name = str(error) if isinstance(error, EngineError) else type(error).__name__
        self._engine = None
        self._become("restarting")
        tickets = self._all_taken()
        say(f"the engine failed ({name}), {len(tickets)} requests end with an error; starting it again")
        self._end_with(tickets, lambda: EngineError(f"the engine failed while it worked on this request ({name}): it may be sent again"))
        self._ledger.lost()
        self._fruitless += 1
        if self._fruitless >= MOST_FRUITLESS:
            raise EngineError(f"{self._fruitless} engines in a row failed before they had done a step: {name}")

    def _become(self, state: State) -> None:
        if self._state in ("loading", "ready", "restarting"):  # a server that stops does not become ready again
            self._state = state

    def _refusal(self) -> Capacity:
        return not_ready(_REASONS.get(self._state, _REASONS["loading"]))

    def _hand_in(self, engine: RemoteEngine, tickets: list[Ticket]) -> None:
        for ticket, number in zip(tickets, engine.submit(tickets[0].ask), strict=True):
            if ticket.ended:  # given back while it waited for an engine
                engine.cancel(number)
            else:
                ticket.number = number
                self._live[number] = ticket

    def _hand_out(self, told: Sequence[Told], load: Load, now: float) -> None:
        if told or load.step_began != self._ledger.load.step_began:
            self._fruitless = 0
        for item in told:
            ticket = self._live.get(item.request)
            if ticket is not None:  # else cancelled
                self._note_start(ticket, item, load.step_began or now)
                self._tell(ticket, item, now)
        self._ledger.stepped(load, sum(isinstance(item, Emitted) for item in told))

    def _tell(self, ticket: Ticket, item: Told, now: float) -> None:
        if isinstance(item, Emitted):
            self._ledger.token(ticket.times, now)
            if item.finish:
                self._end(ticket, item.finish)
        elif isinstance(item, Pooled):
            self._end(ticket, "stop")
        elif isinstance(item, Refused):
            self._end(ticket, "error")
            ticket.events.put_nowait(revived(item.error, item.message, item.param))
            return
        if not isinstance(item, Started):
            ticket.events.put_nowait(item)

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
            self._waiting -= 1

    def _all_taken(self) -> list[Ticket]:
        """Everybody in the engine or before its door; nobody is there afterwards."""
        tickets = [*self._live.values(), *(ticket for waiting in self._inbox for ticket in waiting if not ticket.ended)]
        self._inbox.clear()
        return tickets

    def _end_with(self, tickets: Sequence[Ticket], why: Callable[[], LineshaftError]) -> None:
        for ticket in tickets:
            self._end(ticket, "error")
            ticket.events.put_nowait(why())
