"""A measurement under load as people read it on the terminal; printed by `benching`."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lineshaft.evaluate.load.bench import LoadConfig, Outcome
from lineshaft.evaluate.load.measure import LATE_SHARE, Measured
from lineshaft.evaluate.load.search import Found
from lineshaft.pipeline.page.units import duration, percent, printable

ROWS = {"ttft": "first token (ttft)", "itl": "between tokens (itl)", "tpot": "per token (tpot)", "latency": "whole request"}
COLUMNS = {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99", "max": "longest"}
FEW = 100
"""Below that many requests P99 is about the longest."""


def print_outcome(outcome: Outcome, console: Console) -> None:
    """The table of latencies and the lines below it."""
    measured = outcome.shown.measured
    console.print(Text(printable(_heading(outcome)), "bold"), soft_wrap=True)
    if measured.answered:
        console.print(_latencies(measured))
    for label, text in _lines(outcome):
        console.print(Text.assemble((f"{label:10}", "bold"), printable(text)), soft_wrap=True)


def _heading(outcome: Outcome) -> str:
    config = outcome.config
    rate = "" if outcome.shown.rate is None else f" {outcome.shown.rate:.4g}/s"
    return f"{config.url}  {config.model}  {config.arrivals.kind}{rate} for {config.seconds:g} s"


def _latencies(measured: Measured) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("from when it was due", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for family, label in ROWS.items():
        names = [f"{family}_{end}_seconds" for end in COLUMNS]
        if names[0] in measured.metrics:
            table.add_row(label, *(duration(measured.metrics[name]) for name in names))
    return table


def _lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    measured, metrics = outcome.shown.measured, outcome.shown.measured.metrics
    unfinished = f", {measured.unfinished} under way when it was stopped" if measured.unfinished else ""
    warmup = f", {measured.warmup} to warm up" if measured.warmup else ""
    yield (
        "requests",
        f"{measured.answered} of {measured.offered} answered{unfinished}{warmup}; "
        + (f"{metrics['requests_per_second']:.4g}/s of {metrics['offered_requests_per_second']:.4g}/s offered"),
    )
    counted = "" if measured.counted_by == "server" else f", counted by {measured.counted_by}"
    yield "tokens", f"{metrics['output_tokens_per_second']:.4g}/s out{counted}"
    for kind, count in measured.errors.items():
        yield "failed", f"{count} {kind}: {measured.example[kind]}"
    yield from _slo(outcome.config, measured)
    yield from _client(measured)
    if measured.answered and measured.answered < FEW:
        yield "note", f"of {measured.answered} requests, P99 is about the longest: send more"
    if outcome.found:
        yield "search", _found(outcome.found, outcome.config)


def _slo(config: LoadConfig, measured: Measured) -> Iterator[tuple[str, str]]:
    if config.slo.stated and "goodput_share" in measured.metrics:
        share, rate = measured.metrics["goodput_share"], measured.metrics["goodput_requests_per_second"]
        yield "goodput", f"{percent(share)} of the requests, {rate:.4g}/s, with {config.slo.told()}"


def _client(measured: Measured) -> Iterator[tuple[str, str]]:
    metrics = measured.metrics
    if "send_lag_p99_seconds" in metrics:
        lag, worst = duration(metrics["send_lag_p99_seconds"]), duration(metrics["send_lag_max_seconds"])
        yield "client", f"sent {lag} late at P99, {worst} at most"
    if not measured.keeps_up:
        told = f"this client was late by more than {LATE_SHARE:.0%} of the median time to the first token, or out of connections"
        yield "no result", f"{told}: lower the rate, or send from a machine that does nothing else"


_STOPPED = {
    "slo": "",
    "highest": "; higher ones were not allowed (search.highest, max_requests)",
    "lowest": "; lower ones were not tried",
    "client": "; not sought further, as this client could not keep up",
    "probes": "; the probes ran out (search.probes)",
    "interrupted": "; stopped",
}


def _found(found: Found, config: LoadConfig) -> str:
    needed = f"{percent(config.slo.share)} of the requests with {config.slo.told()}"
    failing = "" if found.failing is None else f", {found.failing:.4g}/s fails"
    if found.rate is None:
        return f"no rate was seen to give {needed}{failing}{_STOPPED[found.limit]}"
    return f"{found.rate:.4g} requests/s is the highest rate with {needed}{failing} ({len(found.probes)} probes){_STOPPED[found.limit]}"
