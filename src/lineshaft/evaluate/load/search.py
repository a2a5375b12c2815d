"""The highest rate that meets an SLO. Pure but for the probe that is handed in; called by `bench`.

What to probe next is a function of what was seen so far. Doubling from the start finds a rate that meets the SLO and one that
does not; then the gap between them is halved (in ratio) until it is within the tolerance. Chance makes a rate near the
border pass or fail: a rate whose outcome chance could have turned is probed again and the counts are added up. The answer
is probed twice at least; if that overturns it, it counts as failing and the search goes on below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PositiveInt

from lineshaft.base.config import Config

_Z = 1.96
"""Standard deviations of a 95 % interval."""
Limit = Literal["slo", "highest", "lowest", "client", "probes", "interrupted"]


class SearchConfig(Config):
    """How the highest rate is looked for."""

    tolerance: float = Field(0.02, gt=0, le=1)
    """Stop when the lowest rate that fails is at most this share above the highest that passes."""
    highest: float = Field(1000.0, gt=0, allow_inf_nan=False)
    """Requests a second that are never exceeded."""
    lowest: float = Field(0.001, gt=0, allow_inf_nan=False)
    """Requests a second below which nothing is sought."""
    repeats: int = Field(3, ge=2)
    """Most probes of one rate whose outcome is in doubt."""
    probes: PositiveInt = 40
    """Most probes altogether; with the length of one they bound the time."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe at one rate saw."""

    rate: float
    """Requests a second that were offered."""
    good: int
    """Requests that kept the SLO."""
    requests: int
    keeps_up: bool = True
    """False where the client was the bottleneck, so that nothing is known about the server."""
    interrupted: bool = False


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    rate: float | None
    """Highest rate that met the SLO, requests a second; None when none did."""
    failing: float | None
    """Lowest rate that did not; None when all did."""
    limit: Limit
    """What ended it: `slo` is the full answer; with the others `rate` is no more than what was seen to work until then."""
    tolerance: float
    probes: list[ProbeResult] = field(default_factory=list)


def find_rate(probe: Callable[[float], ProbeResult], start: float, share: float, config: SearchConfig) -> Found:
    """The highest rate at which `share` of the requests keep the SLO, looked for from `start` requests a second on."""
    seen: list[ProbeResult] = []
    step = next_step(seen, start, share, config)
    while isinstance(step, float):
        seen.append(probe(step))
        step = next_step(seen, start, share, config)
    passing, failing = bracket(seen, share)
    return Found(passing, failing, step, config.tolerance, seen)


def next_step(seen: Sequence[ProbeResult], start: float, share: float, config: SearchConfig) -> float | Limit:
    """The rate to probe now, or why there is none."""
    if not seen:
        return min(max(float(start), config.lowest), config.highest)
    if seen[-1].interrupted:
        return "interrupted"
    last = seen[-1].rate
    late = sum(not result.keeps_up for result in seen if result.rate == last)
    if late >= config.repeats:
        return "client"
    if len(seen) >= config.probes:
        return "probes"
    if not seen[-1].keeps_up:  # a hiccup of this machine, perhaps
        return last
    if _doubtful(seen, last, share, config.repeats):
        return last
    passing, failing = bracket(seen, share)
    if failing is None:
        return "highest" if last >= config.highest else min(2 * last, config.highest)
    if passing is None:
        return "lowest" if failing <= config.lowest else max(failing / 2, config.lowest)
    if failing > passing * (1 + config.tolerance):
        return math.sqrt(passing * failing)
    return "slo" if len(_at(seen, passing)) > 1 else passing


def bracket(seen: Sequence[ProbeResult], share: float) -> tuple[float | None, float | None]:
    """(passing, failing): the lowest rate that failed, and the highest below it that passed."""
    rates = {result.rate for result in seen if result.keeps_up and not result.interrupted}
    passed = {rate for rate in rates if meets(_at(seen, rate), share)}
    failing = min(rates - passed, default=None)
    return max((rate for rate in passed if failing is None or rate < failing), default=None), failing


def meets(results: Sequence[ProbeResult], share: float) -> bool:
    """Whether the requests of all these probes together met the SLO."""
    good, requests = _pooled(results)
    return requests > 0 and good >= share * requests


def interval(good: int, requests: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the chance of a good request, after `good` of `requests`."""
    if not requests:
        return 0.0, 1.0
    share, spread = good / requests, _Z * _Z / requests
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / requests + spread / (4 * requests))
    return middle - half, middle + half


def _at(seen: Sequence[ProbeResult], rate: float) -> list[ProbeResult]:
    return [result for result in seen if result.rate == rate and result.keeps_up and not result.interrupted]


def _pooled(results: Sequence[ProbeResult]) -> tuple[int, int]:
    return sum(result.good for result in results), sum(result.requests for result in results)


def _doubtful(seen: Sequence[ProbeResult], rate: float, share: float, repeats: int) -> bool:
    low, high = interval(*_pooled(_at(seen, rate)))
    return low < share < high and len(_at(seen, rate)) < repeats
