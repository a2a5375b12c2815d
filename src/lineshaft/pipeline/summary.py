"""A finished run on the terminal, or as one JSON object for machines.

Model answers and document reasons may hold anything, so every text passes `printable` and none is read as rich markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.pipeline.lost import COMPARED_AT_ONCE, STYLES, print_lost
from lineshaft.pipeline.outcome import Outcome, Variant
from lineshaft.pipeline.page.page import bigram_sentence
from lineshaft.pipeline.page.units import cell, change, duration, heading, percent, printable


def print_summary(outcome: Outcome, console: Console, *, page: Path | None = None) -> None:
    """Print what was made, what it is worth, one answer, and where the page lies (`page`)."""
    variants = outcome.variants()
    console.print(Text(printable(f"{outcome.recipe}, seed {outcome.seed}"), "bold"))
    console.print(_stages(outcome))
    rest = variants[1:]
    for first in range(0, max(1, len(rest)), COMPARED_AT_ONCE) if variants else ():
        console.print()
        console.print(_metrics(variants[0], rest[first : first + COMPARED_AT_ONCE]))
    if outcome.comparisons:
        console.print()
        print_lost(variants[0].label, outcome.comparisons, console)
    console.print()
    for sentence in (bigram_sentence(variants), dropped_sentence(outcome)):
        if sentence:
            console.print(Text(printable(sentence)))
    for exchange, _ in outcome.exchanges():
        console.print()
        _said(console, "asked", exchange.prompt)
        _said(console, "answered", exchange.answer)
    if page:
        console.print()
        console.print(Text.assemble(("report  ", "bold"), printable(str(page))), soft_wrap=True)


def summary_json(outcome: Outcome) -> dict[str, Any]:
    """The same as a plain table: values exact, in the units of their names."""
    return {
        "recipe": outcome.recipe,
        "seed": outcome.seed,
        "stages": [
            {"name": node.name, "id": node.artifact.id, "digest": node.artifact.manifest.digest}
            | {"cached": node.cached, "seconds": node.seconds}
            for node in outcome.nodes
        ],
        "corpus": outcome.facts("data"),
        "reports": [
            {"name": item.label, "id": item.node.artifact.id, "checkpoint": item.report.subject, "format": item.report.format}
            | {"metrics": item.metrics, "notes": item.report.notes}
            for item in outcome.variants()
        ],
        "comparisons": [{"name": label} | found.table() for label, found in outcome.comparisons],
        "exchanges": [exchange.model_dump() | timing.model_dump() for exchange, timing in outcome.exchanges()],
    }


def dropped_sentence(outcome: Outcome) -> str | None:
    """How many documents were read, kept and dropped, and why; None without a data stage."""
    facts = outcome.facts("data")
    if not facts:
        return None
    read, kept = facts.get("read", 0), facts.get("kept", 0)
    text = f"{kept:,} of {read:,} documents kept" + (f" ({percent(kept / read)})" if read else "")
    why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in outcome.dropped().items())
    return f"{text}; dropped: {why}." if why else f"{text}."


def _stages(outcome: Outcome) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for node in outcome.nodes:
        spent = Text("cached", "dim") if node.cached else Text(duration(node.seconds))
        table.add_row(Text(printable(node.name)), Text(node.artifact.id, "dim"), spent)
    return table


def _metrics(base: Variant, others: Sequence[Variant]) -> Table:
    """Rows: the catalogue's metrics that occur. Columns: the base, then value and change of each of `others`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for item in (base, *others):
        table.add_column(Text(printable(item.label)), justify="right", no_wrap=True)
        if item is not base:
            table.add_column("change", justify="left", no_wrap=True)
    for name in CATALOGUE:
        if any(name in item.metrics for item in (base, *others)):
            table.add_row(heading(name), *_cells(name, base, others))
    return table


def _cells(name: str, base: Variant, others: Sequence[Variant]) -> list[Text]:
    before = base.metrics.get(name)
    cells = [Text("-" if before is None else cell(name, before))]
    for item in others:
        after = item.metrics.get(name)
        cells.append(Text("-" if after is None else cell(name, after)))
        if before is None or after is None:
            cells.append(Text(""))
            continue
        moved = change(name, before, after)
        cells.append(Text(f"{moved.text:>8} {moved.verdict}".rstrip(), STYLES[moved.verdict]))
    return cells


def _said(console: Console, label: str, text: str) -> None:
    """A text that may hold anything, wrapped and set off from ours."""
    console.print(Text(label, "bold"))
    console.print(Padding(Text(printable(text).strip() or "(nothing)"), (0, 0, 0, 2), expand=False))
