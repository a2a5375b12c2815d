"""Which column of a table holds the text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lineshaft.base.errors import SourceError

SAMPLE_ROWS = 200
"""Rows that are looked at for a guess."""

USUAL_NAMES = (
    *("text", "content", "document", "body", "article", "passage", "review", "review_body", "comment", "message", "sentence"),
    *("正文", "文本", "内容", "评论", "评价"),
)
"""Column names that mean the text, best first."""


def pick(name: str, columns: Iterable[str], sample: Iterable[Mapping[str, Any]], wanted: str | None) -> tuple[str, bool]:
    """The text column of the file `name`, and whether it was guessed.

    `wanted` if given. Else a usual name that holds texts, else the column whose texts are longest in the sample.
    Raises SourceError when the wanted one is missing or no column holds text.
    """
    known = list(columns)
    if wanted is not None:
        return _wanted(name, known, wanted), False
    lengths = dict.fromkeys(known, 0)
    for row in sample:
        for column in known:
            value = row.get(column)
            lengths[column] += len(value) if isinstance(value, str) and not _is_number(value) else 0
    by_folded_name = {column.strip().casefold(): column for column in known if lengths[column]}
    for usual in USUAL_NAMES:
        if usual in by_folded_name:
            return by_folded_name[usual], True
    best = max(known, key=lambda column: lengths[column], default=None)
    if best is None or not lengths[best]:
        raise SourceError(f"{name}: no column holds text (columns: {_listed(known)}); check the file, or name one with text_column")
    return best, True


def _wanted(name: str, known: list[str], wanted: str) -> str:
    if wanted in known:
        return wanted
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise SourceError(f'{name}: no column "{wanted}"; {hint}columns: {_listed(known)}')


def _listed(columns: list[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns[:20]) + (", ..." if len(columns) > 20 else "") if columns else "none"


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
