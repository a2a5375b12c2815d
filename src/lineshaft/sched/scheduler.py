"""The scheduler: which tokens of which requests run in the next step.

`plan` decides, the engine runs the plan, `commit` takes the sampled tokens in. Decoding requests go first, one token
each; what is left of the step's token budget goes to prompts, in chunks, in order of arrival. Pages are taken as tokens
come. When none is left, the request that was admitted last gives its pages up and waits at the head of the queue; what it
has produced is kept and its keys are computed again later.
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
        need = self._pages_for(request.limit)
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
        chunks: dict[int, Chunk] = {}
        budget = self.config.step_tokens
        decoding_first = sorted(self.running, key=lambda r: len(r.tokens) - r.cached > 1)
        for request in decoding_first:
            budget -= self._extend(request, budget, chunks)
        while self.waiting and budget > 0 and len(self.running) < self.config.max_batch:
            request = self.waiting[0]
            if self._pages_for(min(len(request.tokens), budget)) > self.pool.free:
                break
            self.running.append(self.waiting.popleft())
            budget -= self._extend(request, budget, chunks)
        return Plan([chunks[request.number] for request in self.running if request.number in chunks])

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

    def _extend(self, request: Request, budget: int, chunks: dict[int, Chunk]) -> int:
        """Plan the request's next tokens, making room if it must; returns how many."""
        if request not in self.running or budget <= 0:
            return 0
        last = min(len(request.tokens), request.cached + budget)
        missing = self._pages_for(last) - len(request.pages)
        while missing > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            chunks.pop(victim.number, None)
            if victim is request:
                return 0
        request.pages += self.pool.take(max(0, missing))
        chunks[request.number] = Chunk(request, request.cached, last)
        return last - request.cached

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
