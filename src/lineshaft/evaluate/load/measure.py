"""From what became of each request to figures. Pure; called by `bench`. Names and units are the catalogue's.

Quantiles are those of the requests that were answered, linear between neighbours. Failed ones have no latency; they count
in `failed` and miss every SLO, so that goodput can't be had by refusing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

from lineshaft.base.catalogue import metric
from lineshaft.base.config import Config
from lineshaft.evaluate.load.generate import Sent
from lineshaft.evaluate.load.record import Record

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
FAMILIES = ("ttft", "itl", "tpot", "latency")
"""What has a mean, quantiles and a maximum: `ttft_p99_seconds` and so on."""
LATE_SHARE, LATE_SECONDS = 0.05, 0.002
"""This client keeps up while it is late by at most that share of the median time to the first token, or by that many seconds."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Slo(Config):
    """What a request must keep to be a good one. Each limit counts from when the request was due; null: no limit."""

    ttft: Seconds | None = None
    """Most seconds to the first token."""
    itl: Seconds | None = None
    """Most seconds from one token to the next, as the mean over the request's tokens."""
    e2e: Seconds | None = None
    """Most seconds to the end of the answer."""
    share: float = Field(0.99, gt=0, lt=1)
    """Share of the requests that must keep all limits for a rate to meet the SLO."""

    @property
    def stated(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in (self.ttft, self.itl, self.e2e))

    def kept_by(self, record: Record) -> bool:
        """Whether the request was answered within every limit."""
        pairs = ((self.ttft, record.ttft), (self.itl, record.per_token), (self.e2e, record.latency))
        return record.answered and all(limit is None or seen is None or seen <= limit for limit, seen in pairs)

    def told(self) -> str:
        """The limits as people read them."""
        limits = {"ttft": self.ttft, "itl": self.itl, "e2e": self.e2e}
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in limits.items() if limit is not None)


@dataclass(frozen=True)
class Measured:
    """The figures of one run. Requests due while it warmed up are left out, but for `warmup`."""

    metrics: dict[str, float]
    """By catalogue name; those without a single sample are absent."""
    offered: int
    """Requests that were due."""
    answered: int
    good: int
    """Answered within the SLO; all answered ones where none is stated."""
    unfinished: int
    """Under way when Ctrl-C ended the run; in no other figure."""
    warmup: int
    errors: dict[str, int] = field(default_factory=dict)
    """Failed requests by kind, the most frequent first."""
    example: dict[str, str] = field(default_factory=dict)
    """What was said about the first failure of each kind."""
    prompt_tokens: int = 0
    """Of the answered requests, as the server counted them."""
    output_tokens: int = 0
    counted_by: str = "none"
    """Who counted the output tokens: `server`, `pieces` of text, `both` in turn, or `none` for nothing to count."""
    keeps_up: bool = True
    """Whether this client was in time; without that the figures are partly its own."""

    @property
    def failed(self) -> int:
        """Requests that were not answered."""
        return sum(self.errors.values())


def measure(sent: Sent, slo: Slo, warmup: float, seconds: float) -> Measured:
    """The figures of requests due from `warmup` on, in a run that was to offer `seconds` more of them."""
    counted = [record for record in sent.records if record.scheduled >= warmup]
    ended = [record for record in counted if record.error or record.ended is not None]
    answered = [record for record in ended if record.answered]
    good = [record for record in answered if slo.kept_by(record)]
    last = max((record.ended or 0.0 for record in answered), default=0.0)
    window = max(1e-9, (sent.seconds if sent.interrupted else max(last, warmup + seconds)) - warmup)
    failures = [record for record in ended if record.error]
    metrics = _latencies(answered) | _rates(answered, good, len(ended), window) | _client(counted, sent.lateness)
    metrics["offered_requests_per_second"] = len(counted) / (min(window, seconds) or window)
    return Measured(
        metrics={name: metrics[name] for name in metrics if metric(name)},
        offered=len(counted),
        answered=len(answered),
        good=len(good),
        unfinished=len(counted) - len(ended),
        warmup=len(sent.records) - len(counted),
        errors=dict(Counter(record.error for record in failures if record.error).most_common()),
        example={record.error: record.detail for record in reversed(failures) if record.error},
        prompt_tokens=sum(record.prompt_tokens or 0 for record in answered),
        output_tokens=sum(record.output_tokens for record in answered),
        counted_by=_counted_by(answered),
        keeps_up=_keeps_up(metrics) and not any(record.error == "client" for record in counted),
    )


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of the samples do not exceed, linear between neighbours (numpy's default)."""
    return float(np.quantile(samples, share))


def spread(family: str, samples: Sequence[float]) -> dict[str, float]:
    """Mean, quantiles and maximum of seconds as metrics; nothing for no samples."""
    if not samples:
        return {}
    values = {"mean": float(np.mean(samples))} | {name: quantile(samples, share) for name, share in QUANTILES.items()}
    return {f"{family}_{name}_seconds": value for name, value in (values | {"max": max(samples)}).items()}


def _latencies(answered: Sequence[Record]) -> dict[str, float]:
    samples: dict[str, Iterable[float | None]] = {
        "ttft": (record.ttft for record in answered),
        "itl": (gap for record in answered for gap in record.gaps),
        "tpot": (record.per_token for record in answered),
        "latency": (record.latency for record in answered),
    }
    spreads = [spread(family, [value for value in values if value is not None]) for family, values in samples.items()]
    return {name: value for part in spreads for name, value in part.items()}


def _rates(answered: Sequence[Record], good: Sequence[Record], ended: int, window: float) -> dict[str, float]:
    return {
        "requests_per_second": len(answered) / window,
        "output_tokens_per_second": sum(record.output_tokens for record in answered) / window,
        "goodput_requests_per_second": len(good) / window,
        **({"goodput_share": len(good) / ended} if ended else {}),
    }


def _client(counted: Sequence[Record], lateness: Sequence[float]) -> dict[str, float]:
    """How late this client was: in sending, and in waking up, which delays the times that it takes as well."""
    lags = [record.lag for record in counted if record.lag is not None]
    found = {"client_lateness_p99_seconds": quantile(lateness, 0.99), "client_lateness_max_seconds": max(lateness)} if lateness else {}
    return found | ({"send_lag_p99_seconds": quantile(lags, 0.99), "send_lag_max_seconds": max(lags)} if lags else {})


def _keeps_up(metrics: dict[str, float]) -> bool:
    late = max(metrics.get("send_lag_p99_seconds", 0.0), metrics.get("client_lateness_p99_seconds", 0.0))
    return late <= max(LATE_SECONDS, LATE_SHARE * metrics.get("ttft_p50_seconds", 1.0))


def _counted_by(answered: Sequence[Record]) -> str:
    kinds = {"pieces" if record.counted_tokens is None else "server" for record in answered}
    return "both" if len(kinds) == 2 else next(iter(kinds), "none")
