"""The scheduler: which tokens of which requests run in the next step.

`plan` decides, the engine runs the plan, `commit` takes the sampled tokens in. Requests are served in order of admission:
one token for each that decodes, and what is left of the step's token budget for prompts, in chunks. (A prompt takes all
that is left, so only the request admitted last can still be reading its own.)

Pages are taken as tokens come. When none is left, the request that was admitted last gives its pages up and waits at the
head of the queue; what it has produced is kept and its keys are computed again later. A waiting request is admitted when
there are free pages for all the tokens it has, so one that has just given way does not come straight back to be thrown
out again.

The first of the running requests never gives way and fits alone, and every step moves it on or gives some request a
token, so every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import CacheFull, QueueFull
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import Emitted, Request


class SchedulerConfig(Config):
    """Limits of one step and of the queue."""

    max_batch: PositiveInt = 32
    """Most requests worked on at once."""
    step_tokens: PositiveInt = 512
    """Most tokens in one step: bounds how long a long prompt can hold up the others."""
    max_waiting: PositiveInt = 256
    """Further requests are refused while this many wait."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `first` up to `last` of one request, to be run in this step."""

    request: Request
    first: int
    last: int

    @property
    def samples(self) -> bool:
        """Does its last token's logit choose the next token? (Not when more of the prompt is to come.)"""
        return self.last == len(self.request.tokens)


@dataclass(frozen=True)
class Plan:
    """One step's work, in the order in which the tokens are packed."""

    chunks: list[Chunk]

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token from this step."""
        return [chunk.request for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Owns all requests and the page pool."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, page_tokens: int) -> None:
        self.config, self.pool, self.page_tokens = config, pool, page_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of admission."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises CacheFull when it could not run even alone, QueueFull when too many wait."""
        need = self._pages_for(request.limit - 1)  # the last token of an answer is never looked back at
        if need > self.pool.pages:
            raise CacheFull(need, self.pool.pages)
        if len(self.waiting) >= self.config.max_waiting:
            raise QueueFull(len(self.waiting))
        self.waiting.append(request)

    def cancel(self, number: int) -> None:
        """Forget a request and free its pages; an unknown number is one that has ended already."""
        for request in [*self.running, *self.waiting]:
            if request.number == number:
                self._leave(request)
                return

    def plan(self) -> Plan:
        """Decide the next step; takes pages and may preempt, but runs nothing. Empty when there is nothing to do."""
        chunks: list[Chunk] = []
        budget = self.config.step_tokens
        for request in list(self.running):
            if chunk := self._extend(request, budget):
                chunks.append(chunk)
                budget -= chunk.last - chunk.first
        while budget > 0 and self._may_admit():
            self.running.append(self.waiting.popleft())
            if chunk := self._extend(self.running[-1], budget):
                chunks.append(chunk)
                budget -= chunk.last - chunk.first
        return Plan(chunks)

    def commit(self, plan: Plan, sampled: Sequence[int]) -> list[Emitted]:
        """Record that the plan ran and which token each of `plan.sampling` got; requests that end leave."""
        for chunk in plan.chunks:
            chunk.request.cached = chunk.last
        emitted = []
        for request, token in zip(plan.sampling, sampled, strict=True):
            finish = request.finish_with(token)
            emitted.append(Emitted(request.number, token, finish))
            if finish is not None:
                self._leave(request)
        return emitted

    def check(self) -> None:
        """Pages held are those of running requests, each by one. Tests call this after every move."""
        self.pool.check()
        held = [page for request in self.running for page in request.pages]
        assert len(set(held)) == len(held) == self.pool.pages - self.pool.free
        assert all(not request.pages and not request.cached for request in self.waiting)
        for request in self.running:
            assert self._pages_for(request.cached) <= len(request.pages) <= self._pages_for(len(request.tokens))
            assert len(request.tokens) < request.limit

    def _may_admit(self) -> bool:
        room = len(self.running) < self.config.max_batch
        return room and bool(self.waiting) and self._pages_for(len(self.waiting[0].tokens)) <= self.pool.free

    def _extend(self, request: Request, budget: int) -> Chunk | None:
        """The request's next tokens, if budget and pages allow; makes room if it must."""
        if budget <= 0 or request not in self.running:
            return None
        last = min(len(request.tokens), request.cached + budget)
        missing = self._pages_for(last) - len(request.pages)
        while missing > self.pool.free:
            victim = self.running[-1]  # admitted after `request`, so not planned yet; or `request` itself
            self._preempt(victim)
            if victim is request:
                return None
        request.pages += self.pool.take(max(0, missing))
        return Chunk(request, request.cached, last)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.pool.give_back(request.pages)
        request.pages, request.cached = [], 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
