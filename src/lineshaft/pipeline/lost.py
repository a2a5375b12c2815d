"""What compressed models lost against the base, as a table: cells for the page, and the same ones on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lineshaft.evaluate.lost import LINES, Compared, Line, Unit
from lineshaft.pipeline.page.units import percent, printable, significant

Labelled = Sequence[tuple[str, Compared]]
"""Each with the label of the model that was compared with the base."""
STYLES = {"better": "green", "worse": "yellow", "": "dim"}
COMPARED_AT_ONCE = 2
"""Models in one table: more would not fit into 100 columns, so they get a table of their own."""


@dataclass(frozen=True)
class LostCell:
    """What one model lost, or has in common with the base."""

    text: str
    """An estimate, and in brackets the ends of its interval."""
    verdict: str
    """`better`, `worse`, or nothing where no difference was seen."""


@dataclass(frozen=True)
class LostRow:
    """One thing compared, of every model."""

    name: str
    words: str
    base: str
    """The base's own value; empty where it has none by itself."""
    cells: list[LostCell | None]
    """In the order of the models; None where it could not be told."""


def lost_rows(found: Labelled) -> list[LostRow]:
    """The rows that occur, in the order of a comparison's lines."""
    columns = [{line.name: line for line in item.lines()} for _, item in found]
    line = {name: item for column in columns for name, item in column.items()}
    return [
        LostRow(name, line[name].words, _base(line[name]), [_cell(column[name]) if name in column else None for column in columns])
        for name in LINES
        if name in line
    ]


def print_lost(base: str, found: Labelled, console: Console) -> None:
    """The tables, what the brackets mean, and what could not be compared."""
    for first in range(0, len(found), COMPARED_AT_ONCE):
        console.print(_table(base, found[first : first + COMPARED_AT_ONCE]))
    for sentence in lost_sentences(found):
        console.print(Text(printable(sentence), "dim"))


def lost_sentences(found: Labelled) -> list[str]:
    """Below the table: equal ones once."""
    return list(dict.fromkeys(sentence for _, item in found for sentence in (item.caption(), *item.notes)))


def _table(base: str, found: Labelled) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("lost", no_wrap=True)
    table.add_column(Text(printable(base)), justify="right", no_wrap=True)
    for label, _ in found:
        table.add_column(Text(printable(label)), no_wrap=True)
    for row in lost_rows(found):
        cells = [Text("") if cell is None else Text(f"{cell.text} {cell.verdict}".rstrip(), STYLES[cell.verdict]) for cell in row.cells]
        table.add_row(row.words, Text(row.base), *cells)
    return table


def _base(line: Line) -> str:
    if line.old is None:
        return ""
    return {"percent": significant(line.old, 5), "points": percent(line.old), "score": f"{line.old:.1f}"}[line.unit]


def _cell(line: Line) -> LostCell:
    found, verdict = line.shown, line.verdict
    signed = line.kind != "common"
    low, middle, high = (_amount(end, line.unit, signed=signed) for end in (found.low, found.estimate, found.high))
    told = verdict if verdict in ("better", "worse") else ""
    unit = {"percent": " %", "points": " pp", "share": " %", "score": ""}[line.unit]
    return LostCell(f"{middle}{unit} ({low} to {high})", told)


def _amount(value: float, unit: Unit, *, signed: bool) -> str:
    scaled = value if unit == "score" else 100 * value
    return f"{scaled:{'+z' if signed else ''}.{1 if unit in ('score', 'share') else 2}f}"
