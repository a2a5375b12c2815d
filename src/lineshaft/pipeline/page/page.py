"""Writes the page: gathers what the outcome holds, hands it to the template, writes one file.

The same artifacts give the same bytes, but for what was measured. The page reads nothing from outside and runs no script;
texts from documents and models are hostile until proved otherwise, so the template escapes every one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.config import flatten
from lineshaft.base.files import full_disk_told, write_atomic
from lineshaft.pipeline.lost import lost_rows, lost_sentences
from lineshaft.pipeline.outcome import Node, Outcome, Variant
from lineshaft.pipeline.page.lineage import lineage_figure
from lineshaft.pipeline.page.plots import dropped_figure, latency_figure, loss_figure, quality_figure
from lineshaft.pipeline.page.units import Change, cell, change, duration, heading, name_of, percent, printable, shown, significant

TEMPLATE = "page.html.j2"
T = TypeVar("T")


@dataclass(frozen=True)
class Headline:
    """One of the big numbers at the top."""

    label: str
    value: str
    """The number, its unit after the first space."""
    note: str


@dataclass(frozen=True)
class Row:
    """One metric of every variant."""

    name: str
    words: str
    help: str
    cells: list[Cell | None]
    """In the order of the variants; None where a report lacks the metric."""


@dataclass(frozen=True)
class Cell:
    """One value."""

    exact: str
    """As in the report's JSON."""
    text: str
    change: Change | None
    """Against the base; None for the base itself."""


def write_page(outcome: Outcome, path: Path) -> None:
    """Write the report of a finished run to `path`, whole or not at all; missing folders are made."""
    with full_disk_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_page(outcome).encode())


def render_page(outcome: Outcome) -> str:
    """The page as text."""
    variants = outcome.variants()
    template = _environment().get_template(TEMPLATE)
    return template.render(
        outcome=outcome,
        variants=variants,
        sentence=bigram_sentence(variants),
        headlines=headlines(outcome, variants),
        figures=[loss_figure(outcome, variants), quality_figure(variants), latency_figure(variants), dropped_figure(outcome)],
        training=training_facts(outcome),
        lineage=lineage_figure(outcome),
        rows=metric_rows(variants),
        notes=notes(variants),
        compared=[label for label, _ in outcome.comparisons],
        lost=lost_rows(outcome.comparisons),
        lost_sentences=lost_sentences(outcome.comparisons),
        machines=machines(variants),
        exchanges=outcome.exchanges(),
    )


def metric_rows(variants: Sequence[Variant]) -> list[Row]:
    """The metrics that occur, in the catalogue's order."""
    names = [name for name in CATALOGUE if any(name in item.metrics for item in variants)]
    return [Row(name, heading(name), CATALOGUE[name].help, [_cell(name, item, variants[0]) for item in variants]) for name in names]


def _cell(name: str, variant: Variant, base: Variant) -> Cell | None:
    if name not in variant.metrics:
        return None
    value, before = variant.metrics[name], base.metrics.get(name)
    moved = None if variant is base or before is None else change(name, before, value)
    return Cell(json.dumps(value), cell(name, value), moved)


def bigram_sentence(variants: Sequence[Variant]) -> str | None:
    """What the base model's bits per byte mean beside the bigram baseline; None when either is missing."""
    if not variants or not {"bits_per_byte", "bigram_bits_per_byte"} <= variants[0].metrics.keys():
        return None
    ours, bigram = variants[0].metrics["bits_per_byte"], variants[0].metrics["bigram_bits_per_byte"]
    gain = 1 - ours / bigram if bigram else 0.0
    return (
        f"Held-out text costs the {variants[0].label} model {ours:.4f} bits a byte and a bigram model of the same tokens "
        f"{bigram:.4f}: {percent(abs(gain))} {'less' if gain >= 0 else 'more'}."
    )


def headlines(outcome: Outcome, variants: Sequence[Variant]) -> list[Headline]:
    """The few numbers that say how the run went."""
    found = []
    facts = outcome.facts("data")
    if facts.get("read"):
        read, kept = facts["read"], facts.get("kept", 0)
        found.append(Headline("documents kept", percent(kept / read), f"{kept:,} of {read:,}"))
    for name, note in (("bits_per_byte", "held-out text"), ("bits_per_byte_below_bigram", "in bits per byte")):
        if variants and name in variants[0].metrics:
            words = "below the bigram baseline" if name.endswith("bigram") else name_of(name)
            found.append(Headline(words, shown(name, variants[0].metrics[name]), f"{variants[0].label}, {note}"))
    for name in ("loss_nats_per_token", "weights_bytes", "peak_memory_bytes", "decode_tokens_per_second", "latency_p50_seconds"):
        found += _moved(name, variants)
    return found


def _moved(name: str, variants: Sequence[Variant]) -> list[Headline]:
    """A metric from the base to the smallest variant."""
    having = [item for item in variants if name in item.metrics]
    if not having or having[0] is not variants[0]:
        return []
    last = min(having, key=lambda item: item.metrics.get("weights_bytes", 0.0))
    before, after = having[0].metrics[name], last.metrics[name]
    if last is having[0]:
        return [Headline(name_of(name), shown(name, before), last.label)]
    note = f"{change(name, before, after).text} against {having[0].label} ({cell(name, before)})"
    return [Headline(f"{name_of(name)}, {last.label}", shown(name, after), note)]


def training_facts(outcome: Outcome) -> str:
    """A sentence on the first checkpoint: its size, and how it was trained."""
    for node in outcome.of_kind("checkpoint"):
        facts, aside = node.artifact.manifest.facts, node.artifact.manifest.aside
        counts = [(key, facts.get(key)) for key in ("parameters", "active_parameters")]
        parts = [f"{count:,} {key.replace('_', ' ')}" for key, count in counts if isinstance(count, int)]
        if isinstance(speed := aside.get("tokens_per_second"), int | float):
            parts.append(f"{significant(speed, 4)} tokens/s in training")
        if precision := dict(flatten(node.artifact.manifest.config)).get("loop.precision"):
            parts.append(f"computed in {precision}")
        return "; ".join(parts)
    return ""


def machines(variants: Sequence[Variant]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the measurements ran on, equal machines once: (labels, [(key, value)])."""
    settings = [(item.label, _settings(item.measured.machine)) for item in variants if item.measured.machine]
    return [(_labels(settings, pairs), pairs) for pairs in _distinct(pairs for _, pairs in settings)]


def notes(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """The reports' notes, equal ones once: (labels, sentence)."""
    said = [(item.label, note) for item in variants for note in item.report.notes]
    return [(_labels(said, note), note) for note in _distinct(note for _, note in said)]


def _distinct(values: Iterable[T]) -> list[T]:
    """Equal values once, in the order of their first appearance."""
    found: list[T] = []
    found.extend(value for value in values if value not in found)
    return found


def _labels(pairs: Sequence[tuple[str, T]], wanted: T) -> str:
    return ", ".join(_distinct(label for label, value in pairs if value == wanted))


def _settings(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested tables as dotted keys and texts."""
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in flatten(table)]


def _inputs(node: Node) -> list[tuple[str, str]]:
    return [(name, digest[:16]) for name, digest in sorted(node.artifact.manifest.inputs.items())]


def _safe(value: Any) -> Any:
    """Applied to whatever the template prints: see `printable`. Our own SVG is Markup and passes."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("lineshaft.pipeline", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"svg": Markup, "duration": duration, "settings": _settings, "inputs": _inputs}
    return made
