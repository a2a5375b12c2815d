"""`lineshaft bench`: open-loop load on any server that speaks OpenAI's language, and the highest rate within an SLO."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lineshaft.base.config import Table, load, merge, nest, parse_assignment
from lineshaft.base.errors import ConfigError
from lineshaft.base.machine import machine
from lineshaft.base.terminal import bar, say
from lineshaft.cli.bench_table import print_outcome
from lineshaft.cli.options import INTERRUPTED, JsonOption, SetOption, ToldStop
from lineshaft.evaluate.load.bench import LoadConfig, Outcome, bench
from lineshaft.evaluate.load.measure import Measured
from lineshaft.pipeline.page.load import load_picture

FORMAT = 1
"""Version of the JSON's layout; raised when a field changes its meaning or goes."""
INCONCLUSIVE = 8
"""Exit status when the figures are no result: nothing was answered, this client was too slow, or no rate met the SLO."""
_FILES = ("bench.json", "requests.jsonl", "bench.svg")
_DEFAULT = LoadConfig()
_DURATION = f"Seconds in which requests are sent; with --find-rate at each rate. Default: {_DEFAULT.seconds:g}, of a trace all of it."


def bench_command(
    url: Annotated[str, typer.Argument(help="The server. Its key, if it wants one, is taken from OPENAI_API_KEY.")] = _DEFAULT.url,
    rate: Annotated[float | None, typer.Option(help="Requests a second; with --find-rate the first to be tried. Default: 1.")] = None,
    duration: Annotated[float | None, typer.Option(help=_DURATION)] = None,
    arrivals: Annotated[str | None, typer.Option(help="constant, poisson, ramp or trace. Default: poisson, trace with --trace.")] = None,
    trace: Annotated[str | None, typer.Option(metavar="FILE", help="JSON Lines to replay: at, prompt_tokens, max_tokens, prompt.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for. Default: the only one that the server lists.")] = None,
    api: Annotated[str, typer.Option(help="completions, or chat, which takes text prompts.")] = _DEFAULT.api,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Take prompts from this text instead of random token ids.")] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Most seconds to the first token of a good request.")] = None,
    slo_itl: Annotated[float | None, typer.Option(help="Most seconds between its tokens, as a mean.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="Most seconds to its end.")] = None,
    slo_share: Annotated[float, typer.Option(help="Share of the requests that must be good.")] = _DEFAULT.slo.share,
    find_rate: Annotated[bool, typer.Option("--find-rate", help="Look for the highest rate that meets the SLO.")] = False,
    warmup: Annotated[float, typer.Option(help="Seconds of load before, not counted.")] = _DEFAULT.warmup,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")] = _DEFAULT.timeout,
    seed: Annotated[int, typer.Option(help="Decides gaps, lengths and prompts.")] = _DEFAULT.seed,
    assignments: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help=f"Write {', '.join(_FILES)} there.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Send requests when they are due, however slow the server is, and measure latencies from then on.

    Status 8 when the figures are no result: nothing was answered, this client could not keep up, or no rate met the SLO.
    """
    kind = arrivals or ("trace" if trace else "poisson")
    table: Table = {
        "url": url,
        "model": model,
        "api": api,
        "arrivals": {"kind": kind} | _given(rate=rate, path=trace),
        "workload": {"prompts": "text" if text or api == "chat" else "ids", "text_file": text},
        "slo": _given(ttft=slo_ttft, itl=slo_itl, e2e=slo_e2e) | {"share": slo_share},
        "search": {} if find_rate else None,
        "warmup": warmup,
        "timeout": timeout,
        "seed": seed,
    } | _given(seconds=duration)
    for assignment in assignments or []:
        table = merge(table, nest(*parse_assignment(assignment)))
    config = load(LoadConfig, table)
    _make_room(out)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        outcome = bench(config, bar)
    except KeyboardInterrupt:
        say("lineshaft: stopped before there was anything to show")
        raise ToldStop(INTERRUPTED) from None
    shown = outcome_json(outcome, started)
    try:
        if out:
            _write(out, outcome, shown)
    finally:  # a full disk must not swallow the figures
        _show(outcome, shown, as_json)
    if outcome.interrupted:
        say("lineshaft: stopped; the figures are those of what was measured until then")
        raise ToldStop(INTERRUPTED)
    if not outcome.conclusive:
        raise typer.Exit(INCONCLUSIVE)


def _show(outcome: Outcome, shown: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(shown, ensure_ascii=False))
    else:
        print_outcome(outcome, Console())


def _given(**values: Any) -> Table:
    return {name: value for name, value in values.items() if value is not None}


def outcome_json(outcome: Outcome, started: str) -> dict[str, Any]:
    """Everything that is known about a measurement but the single requests: what --json prints and bench.json holds."""
    found = outcome.found
    best = {"max_rate_requests_per_second": found.rate} if found and found.rate is not None else {}
    return {
        "format": FORMAT,
        "started": started,
        "target": {"url": outcome.config.url, "model": outcome.config.model, "api": outcome.config.api},
        "config": outcome.config.model_dump(mode="json"),
        "machine": machine(),
        "interrupted": outcome.interrupted,
        "conclusive": outcome.conclusive,
        "rate": outcome.shown.rate,
        "metrics": outcome.shown.measured.metrics | best,
        "requests": _requests(outcome.shown.measured),
        "search": None if found is None else asdict(found),
    }


def _requests(measured: Measured) -> dict[str, Any]:
    counts = {name: value for name, value in asdict(measured).items() if name not in ("metrics", "example")}
    return counts | {"failed": measured.failed, "first_of_each_error": measured.example}


def _make_room(out: Path | None) -> None:
    """Make the folder before anything is measured. Raises ConfigError when it can't be had or holds a result."""
    if out is None:
        return
    if taken := [name for name in _FILES if (out / name).exists()]:
        raise ConfigError(f"{out} already holds {taken[0]}: name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: can't be made: {error.strerror}") from None


def _write(out: Path, outcome: Outcome, shown: dict[str, Any]) -> None:
    """The three files, bench.json last: where it lies the others are whole."""
    lines = (record.table(outcome.config.warmup) for run in outcome.runs for record in run.records)
    texts: dict[str, Iterable[str]] = {
        "bench.svg": [load_picture(outcome)],
        "requests.jsonl": (json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        "bench.json": [json.dumps(shown, ensure_ascii=False, indent=1) + "\n"],
    }
    try:
        for name, text in texts.items():
            with (out / name).open("w", encoding="utf-8") as file:
                file.writelines(text)
    except OSError as error:
        raise ConfigError(f"{out}: can't be written: {error.strerror}") from None
