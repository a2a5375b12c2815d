"""One measurement from its configuration to its figures, and a search made of many. Called by `cli/benching`.

Order: settle the server and the model -> look at it once -> plan the arrivals -> send (`generate`) -> measure. A search
repeats the last three at the rates it chooses, with a seed of its own for each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pydantic
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.base.terminal import Bar
from lineshaft.evaluate.load.arrivals import Arrival, Arrivals, Constant, Poisson, Trace
from lineshaft.evaluate.load.client import LOOK_SECONDS, Target, address, connected, find_model, look, send, usable_key
from lineshaft.evaluate.load.generate import Send, Sent, offer
from lineshaft.evaluate.load.measure import Measured, Seconds, Slo, measure
from lineshaft.evaluate.load.record import Record
from lineshaft.evaluate.load.search import Found, ProbeResult, SearchConfig, find_rate
from lineshaft.evaluate.load.wire import Api, body
from lineshaft.evaluate.load.workload import Asks, Workload

KEY_VARIABLE = "OPENAI_API_KEY"
DAY = 86_400
"""Seconds; no run sends for longer."""
FEWEST = 20
"""A search tries no rate that offers fewer requests: a handful tells no share, and by chance none may be due at all."""
Watch = Callable[[str, int], AbstractContextManager[Bar]]
"""Makes a progress bar from a label and the number of requests to come."""


class LoadConfig(Config):
    """A measurement under load."""

    url: str = "http://127.0.0.1:8000"
    """The server, as http://host:port. The key, if it wants one, is taken from OPENAI_API_KEY."""
    model: str | None = None
    """The model to ask for; by default the only one that the server lists."""
    api: Api = "completions"
    """`completions`, or `chat`, which takes text prompts only."""
    arrivals: Arrivals = Poisson()
    """When requests come."""
    workload: Workload = Workload()
    """What they ask."""
    slo: Slo = Slo()
    """What a good request is."""
    search: SearchConfig | None = None
    """With it the highest rate that meets the SLO is looked for, from the arrivals' rate on."""
    seconds: float = Field(30.0, gt=0, le=DAY, allow_inf_nan=False)
    """How long requests are sent, after the warm-up; in a search at each rate. A trace is played to its end unless this is given."""
    warmup: float = Field(0.0, ge=0, le=3600)
    """Seconds of load before that, at the beginning of the same arrivals; not counted."""
    timeout: Seconds = 60.0
    """Seconds after which a request that is not answered counts as failed, from when it was due."""
    max_requests: PositiveInt = 10_000
    """Most requests of a run, so that a slip of the pen floods nobody."""
    seed: int = Field(0, ge=0)
    """Decides gaps, lengths and prompts."""

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> LoadConfig:
        if self.api == "chat" and self.workload.prompts == "ids":
            raise ValueError('the chat API takes no token ids: set workload.prompts to "text"')
        if self.search and not self.slo.stated:
            raise ValueError("a search needs an SLO: set slo.ttft, slo.itl or slo.e2e")
        if self.search and not isinstance(self.arrivals, Constant | Poisson):
            raise ValueError("a search varies the rate of constant or poisson arrivals, not that of a ramp or trace")
        return self

    @property
    def whole_seconds(self) -> float:
        """Warm-up and measurement."""
        return self.warmup + self.seconds


@dataclass(frozen=True)
class Run:
    """What one run at one rate gave."""

    rate: float | None
    """Requests a second of constant and Poisson arrivals; else None."""
    measured: Measured
    records: list[Record]
    interrupted: bool


@dataclass(frozen=True)
class Outcome:
    """A finished measurement; after a search `shown` is its run at the rate that was found."""

    config: LoadConfig
    """With the URL and model that were settled on."""
    shown: Run
    runs: list[Run] = field(repr=False)
    """All runs; one without a search."""
    found: Found | None = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early."""
        return any(run.interrupted for run in self.runs)

    @property
    def conclusive(self) -> bool:
        """Whether the figures are the server's: this client kept up, something was answered, a search found a rate."""
        return self.shown.measured.keeps_up and self.shown.measured.answered > 0 and (self.found is None or self.found.rate is not None)


def bench(config: LoadConfig, watch: Watch, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Outcome:
    """Measure. Blocks until done or interrupted.

    Raises ConfigError, RequestError, UnknownModel, Capacity or EngineError when the server can't be measured at all, before any
    load. `loop` makes the event loop; its clock is the one that all times are taken by.
    """
    config = _whole_trace(config)
    _refuse_floods(config)
    key = usable_key(os.environ.get(KEY_VARIABLE))
    with asyncio.Runner(loop_factory=loop) as runner:
        target = runner.run(_settled(config, key))
        config = config.model_copy(update={"url": target.url, "model": target.model})

        def run(number: int, rate: float | None) -> Run:
            return runner.run(_run(config, target, rate, number, watch))

        if config.search is None:
            only = run(0, None)
            return Outcome(config, only, [only])
        return _searched(config, config.search, run)


def _searched(config: LoadConfig, search: SearchConfig, run: Callable[[int, float | None], Run]) -> Outcome:
    runs: list[Run] = []

    def probe(rate: float) -> ProbeResult:
        runs.append(run(len(runs), rate))
        seen = runs[-1].measured
        return ProbeResult(rate, seen.good, seen.answered + seen.failed, seen.keeps_up, runs[-1].interrupted)

    assert not isinstance(config.arrivals, Trace)
    most, fewest = config.max_requests / config.whole_seconds, FEWEST / config.seconds
    bounds = {"highest": min(search.highest, most), "lowest": max(search.lowest, fewest)}
    found = find_rate(probe, config.arrivals.rate, config.slo.share, search.model_copy(update=bounds))
    at_rate = [item for item in runs if item.rate == found.rate and item.measured.keeps_up and not item.interrupted]
    return Outcome(config, (at_rate or runs)[-1], runs, found)


async def _settled(config: LoadConfig, key: str | None) -> Target:
    """Who is asked: the server is there, has the model, and answers a request of this kind."""
    url = address(config.url)
    async with connected(key) as session:
        target = Target(url, await find_model(session, url, config.model, key), config.api, key)
        asks = Asks(config.workload, plan(config, None, 0)[:1], config.seed)
        await look(session, target, _body(config, target, asks, None), max(LOOK_SECONDS, config.timeout))
    return target


async def _run(config: LoadConfig, target: Target, rate: float | None, number: int, watch: Watch) -> Run:
    seed = config.seed + number
    arrivals = plan(config, rate, seed)
    asks = Asks(config.workload, arrivals, seed)
    label = "bench" if rate is None else f"{rate:.4g}/s"
    async with connected(target.key) as session:

        def prepare(place: int) -> Send:
            text = _body(config, target, asks, place)
            return lambda record, start: send(session, target, text, record, start)

        with watch(label, len(arrivals)) as bar:
            sent: Sent = await offer([arrival.at for arrival in arrivals], prepare, config.timeout, lambda _: bar.advance())
    for record in sent.records:
        record.probe = number
    measured = measure(sent, config.slo, config.warmup, config.seconds)
    steady = config.arrivals.rate if isinstance(config.arrivals, Constant | Poisson) else None
    return Run(rate or steady, measured, sent.records, sent.interrupted)


def plan(config: LoadConfig, rate: float | None, seed: int) -> list[Arrival]:
    """The arrivals of a run, at another rate than the configured one where `rate` is given; never more than allowed."""
    arrivals = config.arrivals if rate is None else config.arrivals.model_copy(update={"rate": rate})
    planned = arrivals.arrivals(config.whole_seconds, seed)[: config.max_requests]
    if not planned:
        raise ConfigError(f"no request is due within {config.whole_seconds:g} s: raise the rate or the duration")
    return planned


def _body(config: LoadConfig, target: Target, asks: Asks, place: int | None) -> bytes:
    ask = asks.trial() if place is None else asks[place]
    return body(target.api, target.model, ask, ignore_eos=config.workload.ignore_eos, temperature=config.workload.temperature)


def _whole_trace(config: LoadConfig) -> LoadConfig:
    """With a trace's own length, where no other was asked for."""
    if not isinstance(config.arrivals, Trace) or "seconds" in config.model_fields_set:
        return config
    span = config.arrivals.span()
    if span <= config.warmup:
        raise ConfigError(f"the trace lasts {span:g} s, so a warm-up of {config.warmup:g} s leaves nothing to measure")
    if span > DAY:
        raise ConfigError(f"the trace lasts {span:,.0f} s, more than a day: set arrivals.speed, or how much of it to play with --duration")
    return config.model_copy(update={"seconds": span - config.warmup})


def _refuse_floods(config: LoadConfig) -> None:
    expected, most = config.arrivals.expected(config.whole_seconds), config.max_requests
    if expected > most:
        told = f"about {expected:,.0f} requests in {config.whole_seconds:g} s exceed max_requests ({most:,})"
        raise ConfigError(f"{told}: shorten the run, lower the rate, or raise max_requests")
