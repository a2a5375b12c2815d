"""Rounds of work: submit requests, call `step` until they are done. Free of torch: whatever runs the plans is handed in.

plan   which tokens run now (sched)
run    the model over them, through the paged cache
sample a token for each request that is due one
commit the tokens; requests that end leave, their pages are free
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from lineshaft.base.errors import ModelError, RequestError, TooLong
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.page_memory import PageMemory
from lineshaft.engine.program import Runs
from lineshaft.engine.readings import Readings
from lineshaft.engine.sampler import Sampler
from lineshaft.sched.load import Load
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import Ask, Emitted, Event, Refused, Request, Started
from lineshaft.sched.scheduler import Scheduler

BROKEN = "the model's logits are not numbers: its weights are broken, or too large for their dtype"


@dataclass(frozen=True)
class Bounds:
    """What requests must keep to."""

    vocabulary: int
    ends: frozenset[int]
    """Tokens that end an answer."""
    context_tokens: int
    """Most tokens of prompt and answer: what the model was made for, max_context, or what the cache holds, whichever is least."""
    cache_bound: bool
    """It is the cache that is least."""


class Rounds:
    """Continuous batching over one model. Not thread-safe: one thread owns it."""

    def __init__(
        self, bounds: Bounds, config: EngineConfig, cache: PageMemory, runner: Runs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds; decides only how long a request has waited."""
        self.bounds, self.config, self.cache, self._clock = bounds, config, cache, clock
        pools = [PagePool(pages) for pages in cache.pages]
        self.scheduler = Scheduler(config.scheduler, cache.groups, pools, config.page_tokens)
        self.runs = runner
        self.sampler, self.readings = Sampler(runner.draw), Readings()
        self._numbers = count(1)
        self._last = Load()

    @property
    def context_tokens(self) -> int:
        """See Bounds."""
        return self.bounds.context_tokens

    def submit(self, ask: Ask) -> list[int]:
        """Queue a prompt; returns a number for each copy.

        Raises RequestError for a prompt that is empty or holds ids outside the vocabulary, TooLong, CacheFull, QueueFull.
        """
        self._check(ask)
        ends = frozenset() if ask.sampling.ignore_eos else self.bounds.ends
        stops = ends | frozenset(ask.sampling.stop_token_ids)
        requests: list[Request] = []
        for copy, number in zip(range(ask.copies), self._numbers, strict=False):
            seed = ask.sampling.seed
            sampling = ask.sampling if seed is None else ask.sampling.model_copy(update={"seed": _shifted(seed, copy)})
            parent = requests[0] if requests else None
            requests.append(
                Request(
                    number, len(ask.prompt), sampling, stops, list(ask.prompt), ask.task, ask.priority, parent=parent, arrived=self._clock()
                )
            )
        self.scheduler.submit(requests)
        return [request.number for request in requests]

    def cancel(self, request: int) -> None:
        """Forget a request and free its pages now; a number that has ended already is ignored."""
        self.scheduler.cancel(request)
        self._forget(request)

    def step(self) -> Sequence[Event]:
        """Plan, run, sample, commit: the whole engine. [] when there is nothing to do."""
        began = self._clock()
        plan = self.scheduler.plan(began)
        if not plan.chunks:
            return []
        tokens, scores = self.sampler(self.runs.run(plan), plan.sampling)
        read = self.readings.take(plan, self.runs)  # after that: it may have other rows' logits put there
        emitted = [self._told(token) for token in self.scheduler.commit(plan, tokens, scores)]
        busy = self._last.busy_seconds + self._clock() - began
        self._last = Load(step_tokens=plan.tokens, step_requests=len(plan.chunks), step_began=began, busy_seconds=busy)
        return [*(Started(request.number, cached) for request, cached in plan.started), *read, *emitted]

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    def load_now(self) -> Load:
        """How busy it is."""
        last = self._last
        step = {"step_tokens": last.step_tokens, "step_requests": last.step_requests}
        return replace(self.scheduler.load_now(), step_began=last.step_began, busy_seconds=last.busy_seconds, **step)

    def _told(self, token: Emitted) -> Emitted | Refused:
        """What the request is told. It ends where no logit was a number (sampler.py): no other request hangs on it."""
        if token.token < 0:
            self.cancel(token.request)
            return Refused(token.request, ModelError.__name__, BROKEN)
        if token.finish is not None:
            self._forget(token.request)
        return token

    def _forget(self, number: int) -> None:
        self.sampler.forget(number)
        self.readings.forget(number)

    def _check(self, ask: Ask) -> None:
        prompt, most, vocabulary = ask.prompt, ask.sampling.max_tokens, self.bounds.vocabulary
        if not prompt:
            raise RequestError("the prompt is empty: it must hold at least one token", "prompt")
        if bad := [token for token in prompt if not 0 <= token < vocabulary]:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {vocabulary}", "prompt")
        if bad := [token for token in ask.sampling.logit_bias if not 0 <= token < vocabulary]:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {vocabulary}", "logit_bias")
        if len(prompt) + most > self.context_tokens:
            more = "; a larger cache_bytes would allow more" if self.bounds.cache_bound else ""
            raise TooLong(
                f"{len(prompt)} prompt tokens and {most} to produce exceed the context of {self.context_tokens} tokens: "
                f"shorten the prompt or lower max_tokens{more}",
                "max_tokens" if len(prompt) < self.context_tokens else "prompt",
            )


def _shifted(seed: int, copy: int) -> int:
    """seed + copy within 64 bits."""
    return (seed + copy + 2**63) % 2**64 - 2**63
