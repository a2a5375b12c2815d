"""The four plots of the page: loss, size against quality, latency, dropped documents.

Each is a function of the outcome and returns a Figure, whose drawing is None when there is nothing to draw: the caption
then says what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lineshaft.pipeline.outcome import Outcome, Variant
from lineshaft.pipeline.page.svg import Axis, Plot, Point, bars, shortened, thinned
from lineshaft.pipeline.page.units import duration, percent, shown, size

MOST_POINTS = 1000
"""A curve of more points is thinned: the drawing has fewer pixels than that."""
SMOOTH_SHARE = 0.03
"""The smoothed loss is a mean over this share of the logged steps."""
_HELDOUT, _BIGRAM = 2, 3
"""Series numbers of the reference lines, so that they look alike in every plot."""
_QUANTILES = (("P50", 0.50), ("P90", 0.90), ("P99", 0.99))


@dataclass(frozen=True)
class Figure:
    """A plot with its heading and a caption; without a drawing the caption says why there is none."""

    title: str
    svg: str | None
    caption: str


def loss_figure(outcome: Outcome, variants: Sequence[Variant]) -> Figure:
    """Training loss of every logged step, smoothed too, with the held-out loss and the bigram's as levels."""
    title = "Loss while training"
    points = [(float(row["step"]), float(row["loss"])) for row in outcome.history() if math.isfinite(row["loss"])]
    if not points:
        return Figure(title, None, "No training history: no checkpoint of this run was trained here.")
    ours, bigram = ("loss_nats_per_token", "held-out", _HELDOUT), ("bigram_loss_nats_per_token", "bigram, held-out", _BIGRAM)
    levels = _levels(variants[:1], ours, bigram)
    smooth = smoothed(points, round(len(points) * SMOOTH_SHARE))
    summary = f"Training loss goes from {points[0][1]:.4f} to {points[-1][1]:.4f} nats a token at step {points[-1][0]:,.0f}."
    summary += "".join(f" Level of {label}." for label, _, _ in levels)
    x = Axis.over("training step", [step for step, _ in points], zero=True, wanted=7)
    y = Axis.over("loss, nats/token", [*(loss for _, loss in points), *(value for _, value, _ in levels)])
    plot = Plot("loss", title, summary, x, y)
    plot.line(thinned(points, MOST_POINTS), 0, "line faint")
    plot.line(thinned(smooth, MOST_POINTS), 0)
    plot.levels(levels)
    caption = f"Thin: the {len(points):,} logged steps. Thick: their moving mean."
    if levels:
        caption += f" Dashed: the {variants[0].label} model and a bigram model of the same tokens, on held-out text."
    return Figure(title, plot.write(), caption)


def quality_figure(variants: Sequence[Variant]) -> Figure:
    """Size of the weights against bits per byte, one marker a variant, the bigram baseline as a level."""
    title = "Size against quality"
    places = [(item, _size_and_bits(item)) for item in variants]
    drawn = [(item, place) for item, place in places if place]
    if not drawn:
        return Figure(title, None, "No report of this run has both weights_bytes and bits_per_byte.")
    levels = _levels(variants[:1], ("bigram_bits_per_byte", "bigram", _BIGRAM))
    x = Axis.over("weights, MiB", [place[0] for _, place in drawn], zero=True, air=0.04)
    y = Axis.over("bits per byte, held-out", [*(place[1] for _, place in drawn), *(value for _, value, _ in levels)], air=0.04)
    tips = [f"{item.label}: {size(place[0] * 2**20)}, {place[1]:.4f} bits/byte" for item, place in drawn]
    plot = Plot("quality", title, "; ".join(tips) + ". Lower and further left is better.", x, y, _legend([item for item, _ in drawn]))
    plot.levels(levels)
    plot.notes([(place, f"{place[1]:.4f}") for _, place in drawn])
    for number, ((_, place), tip) in enumerate(zip(drawn, tips, strict=True)):
        plot.marker(place, number, tip)
    return Figure(title, plot.write(), "Left and down is better: smaller weights, fewer bits for the same held-out text.")


def latency_figure(variants: Sequence[Variant]) -> Figure:
    """Share of requests answered within a time, a curve a variant, with markers at P50, P90 and P99."""
    title = "Latency of a request"
    timed = [_Timed(item, times, _marks(item)) for item in variants if (times := _latencies(item))]
    if not timed:
        return Figure(title, None, "No latency samples in the reports of this run.")
    slowest = max(item.seconds[-1] for item in timed)
    factor, unit = (1000, "ms") if slowest < 1 else (1, "s")
    x = Axis.over(f"time of a whole request, {unit}", [slowest * factor], zero=True, wanted=7)
    y = Axis("share of requests, %", [0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    told = "; ".join(item.told() for item in timed) + "."
    plot = Plot("latency", title, told, x, y, _legend([item.variant for item in timed]))
    for number, item in enumerate(timed):
        plot.line(steps([seconds * factor for seconds in item.seconds]), number)
        for name, share, value in item.marks:
            plot.marker((min(value * factor, x.ticks[-1]), share * 100), number, f"{item.variant.label}: {name} {duration(value)}")
    return Figure(title, plot.write(), f"Markers, from below: P50, P90, P99. {told}")


@dataclass(frozen=True)
class _Timed:
    """A variant's latencies, ascending, and its (name, share, seconds) quantiles."""

    variant: Variant
    seconds: list[float]
    marks: list[tuple[str, float, float]]

    def told(self) -> str:
        marks = "".join(f", {name} {duration(value)}" for name, _, value in self.marks)
        return f"{self.variant.label}{marks} ({len(self.seconds):,} requests)"


def dropped_figure(outcome: Outcome) -> Figure:
    """Documents dropped, a bar a reason, with counts and shares of all that were read."""
    title = "Documents dropped, by reason"
    facts, counts = outcome.facts("data"), outcome.dropped()
    if not facts:
        return Figure(title, None, "This recipe has no data stage.")
    read, kept = facts.get("read", 0), facts.get("kept", 0)
    caption = f"{read:,} documents read, {kept:,} kept" + (f" ({percent(kept / read)})" if read else "")
    caption += "".join(f"; {split}: {counted['documents']:,}" for split, counted in sorted(facts.get("splits", {}).items())) + "."
    if not counts:
        return Figure(title, None, caption + " None was dropped.")
    total = read or sum(counts.values())
    words = {reason: shortened(reason.replace("_", " "), 30) for reason in counts}
    rows = [(words[reason], float(count), f"{count:,} ({percent(count / total)})") for reason, count in counts.items()]
    summary = caption + " " + "; ".join(f"{label}: {text}" for label, _, text in rows) + "."
    return Figure(title, bars("dropped", title, summary, rows).write(), caption + " Shares are of the documents read.")


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over `window` points around each; towards the ends over as many as there are on both sides, so nothing lags."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    result = []
    for number, (across, _) in enumerate(points):
        reach = min(window // 2, number, len(points) - 1 - number)
        first, last = number - reach, number + reach + 1
        result.append((across, (sums[last] - sums[first]) / (last - first)))
    return result


def steps(ascending: Sequence[float]) -> list[Point]:
    """The empirical distribution of `ascending` as corners of a staircase, in percent."""
    corners: list[Point] = [(0.0, 0.0)]
    for number, value in enumerate(ascending, 1):
        corners += [(value, corners[-1][1]), (value, 100 * number / len(ascending))]
    return thinned(corners, 2 * MOST_POINTS)


def _levels(variants: Sequence[Variant], *wanted: tuple[str, str, int]) -> list[tuple[str, float, int]]:
    """Reference lines from the variants' metrics: (metric, words, series) to (label, value, series)."""
    found = [(name, words, series, item.metrics.get(name)) for item in variants for name, words, series in wanted]
    known = [(name, words, series, value) for name, words, series, value in found if value is not None and math.isfinite(value)]
    return [(f"{words}: {shown(name, value)}", value, series) for name, words, series, value in known]


def _size_and_bits(variant: Variant) -> Point | None:
    weights, bits = variant.metrics.get("weights_bytes"), variant.metrics.get("bits_per_byte")
    return None if weights is None or bits is None or not math.isfinite(bits) else (weights / 2**20, bits)


def _latencies(variant: Variant) -> list[float]:
    return sorted(seconds for seconds in variant.measured.samples.get("latency_seconds", []) if math.isfinite(seconds))


def _marks(variant: Variant) -> list[tuple[str, float, float]]:
    """The report's own quantiles, not ours of the samples, so that plot and table can't disagree."""
    found = ((name, share, variant.metrics.get(f"latency_{name.lower()}_seconds")) for name, share in _QUANTILES)
    return [(name, share, value) for name, share, value in found if value is not None and math.isfinite(value)]


def _legend(variants: Sequence[Variant]) -> list[tuple[str, int]]:
    return [(shortened(f"{item.label} ({item.report.format})", 40), number) for number, item in enumerate(variants)]
