"""Numbers and texts as people read them: MiB instead of bytes, ms instead of seconds, changes with a verdict.

Used by the terminal table and the HTML page alike, so both show the same characters for the same value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from lineshaft.base.catalogue import metric

Verdict = Literal["better", "worse", ""]

SHARES = frozenset({"next_token_accuracy", "bits_per_byte_below_bigram", "quantised_share_of_fp32", "goodput_share"})
"""Metrics between 0 and 1 that read best in percent; the catalogue gives them no unit, as it does perplexity."""

_UNIT_SUFFIX = {"nats/token": "_nats_per_token", "bytes": "_bytes", "s": "_seconds", "tokens/s": "_tokens_per_second"}
_IN_HEADING = frozenset({"nats/token", "tokens/s"})
"""Units that are long and the same in a whole row."""
_CAPITALS = {"kv": "KV", "usd": "USD", "fp32": "FP32", "p50": "P50", "p90": "P90", "p99": "P99"}
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


@dataclass(frozen=True)
class Change:
    """How a value differs from the base."""

    text: str
    """`-73.4 %`, `+0.31 pp` (percentage points, for shares), or `same`."""
    verdict: Verdict
    """Empty when the value is the same or neither direction is better."""


def printable(text: str) -> str:
    """`text` fit to be shown: control characters (which could steer a terminal), characters that reorder their
    surroundings, and what XML or UTF-8 can't hold become U+FFFD. Line breaks and tabs stay."""
    return _HIDDEN.sub("\ufffd", text.replace("\r\n", "\n"))


def name_of(name: str) -> str:
    """A metric's catalogue name as words, without the unit that its value is shown with."""
    stem = name.removesuffix(_UNIT_SUFFIX.get(metric(name).unit, ""))
    return " ".join(_CAPITALS.get(word, word) for word in stem.split("_"))


def heading(name: str) -> str:
    """A metric's name for a row of a table, with the unit where `cell` leaves it out: `decode, tokens/s`."""
    unit = metric(name).unit
    return f"{name_of(name)}, {unit}" if unit in _IN_HEADING else name_of(name)


def cell(name: str, value: float) -> str:
    """A metric's value for a table, below its `heading`."""
    unit = metric(name).unit
    return shown(name, value).removesuffix(f" {unit}") if unit in _IN_HEADING else shown(name, value)


def shown(name: str, value: float) -> str:
    """A metric's value with its unit, such as `12.4 MiB`."""
    unit = metric(name).unit
    if name in SHARES:
        return percent(value)
    match unit:
        case "bytes":
            return size(value)
        case "s":
            return duration(value)
        case "USD":
            return f"${significant(value, 3)}"
        case "nats/token":
            return f"{value:.4f} {unit}"
        case "bits/byte" | "bits":  # the metric's name says the unit
            return f"{value:.4f}"
        case "tokens" | "weights":
            return f"{value:,.0f}"
        case _:
            return f"{significant(value, 4)} {unit}".strip()


def significant(value: float, digits: int) -> str:
    """`value` to so many significant digits, never in powers of ten, thousands separated: `1,234`, `0.0123`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number: 0.09996 has that of 0.100
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"


def size(value: float) -> str:
    """Bytes in the binary unit that keeps the number below 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} B" if unit == "B" else f"{significant(value, 4)} {unit}"
        value /= 1024
    return f"{significant(value, 4)} TiB"


def duration(seconds: float) -> str:
    """Seconds as ms, s or minutes."""
    if abs(seconds) < 1:
        return f"{significant(seconds * 1000, 3)} ms"
    if abs(seconds) < 120:
        return f"{significant(seconds, 3)} s"
    return f"{significant(seconds / 60, 3)} min"


def percent(share: float) -> str:
    """A share of 1 in percent, to 3 significant digits but never finer than a hundredth."""
    if not math.isfinite(share):
        return f"{share:g}"
    return f"{share * 100:.{1 if abs(share) >= 0.1 else 2}f} %"


def change(name: str, before: float, after: float) -> Change:
    """From the base's value to a variant's: points for shares, percent of the base for everything else."""
    if before == after:
        return Change("same", "")
    if not (math.isfinite(before) and math.isfinite(after)):
        return Change("n/a", "")
    if name in SHARES:
        text = f"{(after - before) * 100:+z.2f} pp"
    elif before == 0:
        text = f"{after - before:+.3g}"
    else:
        text = _signed_percent((after - before) / abs(before))
    better = metric(name).better
    if better == "neither":
        return Change(text, "")
    return Change(text, "better" if (after < before) == (better == "lower") else "worse")


def _signed_percent(share: float) -> str:
    if abs(share) >= 10:
        return f"{share + 1:.0f}x"
    digits = f"{abs(share) * 100:.1f}" if abs(share) >= 0.01 else significant(abs(share) * 100, 2)
    return f"{'+' if share > 0 else '-'}{digits} %"
