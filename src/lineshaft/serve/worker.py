"""The thread that owns the engine.

The event loop hands requests in through an inbox and gets their tokens back in an asyncio queue for each. Only the
thread touches the engine. When the engine fails, every request in flight gets an error, the fault is written to stderr,
and a fresh engine is loaded, so the service lives on; nobody is left waiting.
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
from typing import Literal, Protocol, TypeAlias

from lineshaft.base.errors import Capacity, EngineError, LineshaftError, QueueFull
from lineshaft.base.terminal import say
from lineshaft.sched.request import Ask, Emitted, Pooled, Started
from lineshaft.sched.request import Event as Told
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.refusals import not_ready
from lineshaft.text.tokenizer import Tokenizer

State = Literal["loading", "ready", "draining", "failed", "stopped"]
Event: TypeAlias = Told | LineshaftError
_REASONS = {
    "loading": "the model is being loaded: try again later",
    "draining": "the server is stopping and takes no new requests",
    "failed": "the engine could not be loaded again after a failure",
    "stopped": "the server has stopped",
}


class Load(Protocol):
    """How busy an engine is."""

    @property
    def running(self) -> int:
        """Requests being worked on."""

    @property
    def waiting(self) -> int:
        """Requests taken in but not worked on."""

    @property
    def cache_usage(self) -> float:
        """Share of cache pages in use."""


class Engine(Protocol):
    """What is needed of `engine.loop.Engine`."""

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer."""

    @property
    def idle(self) -> bool:
        """True when `step` has nothing to do."""

    def submit(self, ask: Ask) -> list[int]:
        """Take a request in; returns a number for each copy. Raises RequestError or Capacity."""

    def cancel(self, request: int) -> None:
        """Forget a request and free its pages."""

    def step(self) -> Sequence[Told]:
        """Do one round of work."""

    def load_now(self) -> Load:
        """How busy it is."""


@dataclass(frozen=True)
class Served:
    """A loaded model."""

    engine: Engine
    tokenizer: Tokenizer


@dataclass(eq=False)
class Ticket:
    """One answer on its way through the engine. Made by `Worker.submit`, given back by `Worker.release`."""

    ask: Ask
    arrived: float
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    number: int = -1
    """The engine's number for it."""
    last_token: float | None = None
    """When the latest token came, on the monotonic clock."""
    waits: bool = True
    """No step has worked on it yet."""
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
        self._metrics = metrics
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
        self._busy: Load | None = None
        self.failure: Exception | None = None
        """Why loading failed; the server can't go on after that."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.follow("vllm:num_requests_waiting", lambda: self._waiting)
        metrics.follow("vllm:num_requests_running", lambda: busy.running if (busy := self._busy) else 0)
        metrics.follow("vllm:kv_cache_usage_perc", lambda: busy.cache_usage if (busy := self._busy) else 0)

    # -- the event loop's side --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model. Call it inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def state(self) -> State:
        """Where its life stands; it takes requests only when `ready`."""
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
        """The loaded model. Raises Capacity (503) with the reason."""
        served = self._served
        if self._state != "ready" or served is None:
            raise self._refusal()
        return served

    def submit(self, ask: Ask, arrived: float) -> list[Ticket]:
        """Hand a request in; a ticket for each copy. `arrived` is a time of `time.monotonic`. Raises Capacity (503) or QueueFull."""
        tickets = [Ticket(ask, arrived) for _ in range(ask.copies)]
        with self._changed:
            if self._state != "ready":  # asked under the lock: whoever empties the inbox for good changes the state first
                raise self._refusal()
            if self._waiting >= self._max_waiting:
                raise QueueFull(self._waiting)
            self._waiting += len(tickets)
            self._inbox.append(tickets)
            self._changed.notify()
        self._open.update(tickets)
        return tickets

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back; a request that has not ended is cancelled. May be called again."""
        self._open.discard(ticket)
        with self._changed:
            if not ticket.ended:
                self._cancelled.append(ticket)
                self._changed.notify()

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "draining"

    def stop(self) -> None:
        """End the thread after its present step; requests still in flight get an error."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify()

    async def join(self, seconds: float) -> None:
        """Wait for the thread to end, at most so long: a model that is still loading is not waited for."""
        await asyncio.to_thread(self._thread.join, seconds)

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
        self._served = self._load()
        self._become("ready")
        self._on_ready(time.monotonic() - began)
        try:
            self._work(self._served.engine)
        except Exception as error:  # whatever it was, the engine's state can't be trusted any more
            traceback.print_exc(file=sys.stderr)
            name = type(error).__name__
            say(f"the engine failed ({name}), {len(self._live) + sum(map(len, self._inbox))} requests end with an error; loading it again")
            self._become("loading")
            self._end_all(lambda: EngineError(f"the engine failed while it worked on this request ({name}): it may be sent again"))
            self._served = self._busy = None

    def _become(self, state: State) -> None:
        with self._changed:
            if state == "failed" or self._state in ("loading", "ready"):  # a server that stops does not become ready again
                self._state = state

    def _refusal(self) -> Capacity:
        return not_ready(_REASONS.get(self._state, _REASONS["loading"]))

    def _work(self, engine: Engine) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._state == "stopped" or self._inbox or self._cancelled or not engine.idle)
                if self._state == "stopped":
                    return
                cancelled, self._cancelled = self._cancelled, []
            self._admit(engine)
            self._cancel(engine, cancelled)
            began = time.monotonic()
            told = engine.step()
            self._busy = engine.load_now()
            self._note_started(began, self._busy.waiting, {item.request for item in told})
            self._hand_out(told, time.monotonic())

    def _admit(self, engine: Engine) -> None:
        while self._inbox:
            tickets = self._inbox[0]  # they stay there until the engine has them, so that a failure finds them
            try:
                numbers = engine.submit(tickets[0].ask)
            except LineshaftError as error:
                for ticket in tickets:
                    self._end(ticket, "error")
                    self._post([(ticket, error)])
            else:
                for ticket, number in zip(tickets, numbers, strict=True):
                    ticket.number = number
                    self._live[number] = ticket
            self._inbox.popleft()

    def _cancel(self, engine: Engine, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if not ticket.ended:
                engine.cancel(ticket.number)
                if ticket.answered and ticket.last_token is not None:
                    self._metrics.observe("vllm:e2e_request_latency_seconds", ticket.last_token - ticket.arrived)
                self._end(ticket, "stop" if ticket.answered else "abort")

    def _note_started(self, began: float, waiting: int, emitted: set[int]) -> None:
        """Find out which requests the step was the first to work on: all but the last ones in, as many as still wait."""
        first = len(self._live) - waiting
        for place, ticket in enumerate(self._live.values()):
            if ticket.waits and (place < first or ticket.number in emitted):
                self._no_longer_waits(ticket)
                self._metrics.observe("vllm:request_queue_time_seconds", began - ticket.arrived)
                self._metrics.count("vllm:prompt_tokens", len(ticket.ask.prompt))

    def _hand_out(self, told: Sequence[Told], now: float) -> None:
        events: list[tuple[Ticket, Event]] = []
        for item in told:
            ticket = self._live.get(item.request)
            if ticket is None:
                continue  # cancelled
            if isinstance(item, Started):
                continue
            if not isinstance(item, Emitted):
                if isinstance(item, Pooled):
                    self._end(ticket, "stop")
                events.append((ticket, item))
                continue
            if ticket.last_token is None:
                self._metrics.observe("vllm:time_to_first_token_seconds", now - ticket.arrived)
            else:
                self._metrics.observe("vllm:inter_token_latency_seconds", now - ticket.last_token)
            ticket.last_token = now
            if item.finish:
                self._metrics.observe("vllm:e2e_request_latency_seconds", now - ticket.arrived)
                self._end(ticket, item.finish)
            events.append((ticket, item))
        self._metrics.count("vllm:generation_tokens", sum(isinstance(item, Emitted) for item in told))
        self._post(events)

    def _end(self, ticket: Ticket, reason: str) -> None:
        ticket.ended = True
        self._no_longer_waits(ticket)
        self._live.pop(ticket.number, None)
        self._metrics.count("vllm:request_success", finished_reason=reason)

    def _no_longer_waits(self, ticket: Ticket) -> None:
        if ticket.waits:
            ticket.waits = False
            with self._changed:
                self._waiting -= 1

    def _end_all(self, why: Callable[[], LineshaftError]) -> None:
        """Answer everybody with an error. The state must be one that lets nobody in any more."""
        tickets = [*self._live.values(), *(ticket for waiting in self._inbox for ticket in waiting)]
        self._inbox.clear()
        for ticket in tickets:
            self._end(ticket, "error")
            self._post([(ticket, why())])

    def _post(self, events: list[tuple[Ticket, Event]]) -> None:
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
