"""The picture of a measurement under load, as a file of its own: `cli/benching` writes it to bench.svg.

Two drawings below each other: what share of the requests was answered within which time, and how the times went over the
run, which shows stalls and queues that no quantile does. After a search the second is share against rate instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from lineshaft.evaluate.load.bench import Outcome
from lineshaft.evaluate.load.measure import QUANTILES
from lineshaft.evaluate.load.record import Record
from lineshaft.evaluate.load.search import Found
from lineshaft.pipeline.page.plots import steps
from lineshaft.pipeline.page.svg import HEIGHT, WIDTH, Axis, Plot, Point, thinned
from lineshaft.pipeline.page.units import duration, percent

MOST_MARKERS = 1500
"""More requests than that are thinned: their markers would cover each other, and the file grow without end."""
_TITLE = 26.0
_FIRST, _WHOLE, _FAILED, _LEVEL = 0, 1, 3, 2
_SERIES = (("first token", "ttft", _FIRST), ("whole request", "latency", _WHOLE))
_SHAPES = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
.title { font-size: 15px; font-weight: 600; } .label { font-weight: 600; stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; }
.grid, .axis, .line, .level { fill: none; } .line { stroke-width: 2.2; stroke-linejoin: round; } .level { stroke-width: 1.6; }
"""
_LIGHT = ("#ffffff", "#1b1f24", "#57606a", "#e8eaed", ("#0063a6", "#c65300", "#00785a", "#9a4a82"))
_DARK = ("#1c2024", "#e6e8ea", "#a3abb3", "#2a2f35", ("#6cbcf5", "#f5a14a", "#3fd0a4", "#e59cca"))
"""Card, ink, soft ink, grid, series: the page's colours. Spelled out, as viewers other than browsers know no CSS variables."""


def _colours(card: str, ink: str, soft: str, grid: str, series: Sequence[str]) -> str:
    rules = [f"svg {{ background: {card}; }} text {{ fill: {ink}; }} .tick, .axis-label {{ fill: {soft}; }}"]
    rules += [f".grid {{ stroke: {grid}; }} .axis {{ stroke: {soft}; }} .label {{ stroke: {card}; }} .ground {{ fill: {card}; }}"]
    for number, colour in enumerate(series):
        rules += [f".line.s{number}, .level.s{number} {{ stroke: {colour}; }} .marker.s{number} {{ fill: {colour}; }}"]
    return "\n".join(rules)


_STYLE = f"{_SHAPES}{_colours(*_LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_colours(*_DARK)}\n}}\n"


def load_picture(outcome: Outcome) -> str:
    """The picture as the text of an SVG file. Raises nothing for a run without answers: it then has less to show."""
    answered = [record for record in outcome.shown.records if record.answered and record.scheduled >= outcome.config.warmup]
    plots = [_distribution(outcome, answered)] if answered else []
    plots.append(_search(outcome.found, outcome.config.slo.share) if outcome.found else _timeline(outcome, answered))
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "width": f"{WIDTH:g}"})
    root.set("viewBox", f"0 0 {WIDTH:g} {(HEIGHT + _TITLE) * len(plots):g}")
    SubElement(root, "style").text = _STYLE
    SubElement(root, "rect", {"class": "ground", "width": "100%", "height": "100%"})
    for number, plot in enumerate(plots):
        top = number * (HEIGHT + _TITLE)
        SubElement(root, "text", {"class": "title", "x": "8", "y": f"{top + 20:g}"}).text = plot.title
        plot.root.set("y", f"{top + _TITLE:g}")
        plot.root.set("height", f"{HEIGHT:g}")
        root.append(plot.root)
    return tostring(root, encoding="unicode") + "\n"


def _distribution(outcome: Outcome, answered: Sequence[Record]) -> Plot:
    """Share of the answered requests within a time, with markers at P50, P90 and P99."""
    metrics = outcome.shown.measured.metrics
    factor, unit = _unit(metrics["latency_max_seconds"])
    x = Axis.over(f"time since the request was due, {unit}", [metrics["latency_max_seconds"] * factor], zero=True, wanted=7)
    y = Axis("share of answered requests, %", [0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    told = [
        f"{label}: " + ", ".join(f"{end.upper()} {duration(metrics[f'{family}_{end}_seconds'])}" for end in QUANTILES)
        for label, family, _ in _SERIES
    ]
    rate = "" if outcome.shown.rate is None else f" at {outcome.shown.rate:.4g} requests/s"
    legend = [(label, series) for label, _, series in _SERIES]
    plot = Plot("distribution", f"Latency{rate}, markers at P50, P90 and P99", "; ".join(told), x, y, legend)
    for label, family, series in _SERIES:
        values = sorted(value for record in answered if (value := getattr(record, family)) is not None)
        plot.line(steps([value * factor for value in values]), series)
        for end, share in QUANTILES.items():
            value = metrics[f"{family}_{end}_seconds"]
            plot.marker((value * factor, share * 100), series, f"{label}: {end.upper()} {duration(value)}")
    return plot


def _timeline(outcome: Outcome, answered: Sequence[Record]) -> Plot:
    """Every request's times at the moment it was due; failed ones on the ground."""
    failed = [record for record in outcome.shown.records if record.error]
    factor, unit = _unit(outcome.shown.measured.metrics.get("latency_max_seconds", 1.0))
    points = {
        series: [(record.scheduled, value * factor) for record in answered if (value := getattr(record, family)) is not None]
        for _, family, series in _SERIES
    }
    x = Axis.over("when the request was due, s", [record.scheduled for record in outcome.shown.records], zero=True, wanted=7)
    y = Axis.over(f"time since it was due, {unit}", [value for places in points.values() for _, value in places], zero=True)
    legend = [(label, series) for label, _, series in _SERIES] + ([("failed", _FAILED)] if failed else [])
    summary = f"{len(answered)} requests answered, {len(failed)} failed."
    plot = Plot("timeline", "Latency over the run", summary, x, y, legend)
    for label, _, series in reversed(_SERIES):
        for point in thinned(points[series], MOST_MARKERS):
            plot.marker(point, series, f"{label} {point[1]:.4g} {unit}, due at {point[0]:.2f} s")
    for record in thinned([(record.scheduled, 0.0) for record in failed], MOST_MARKERS):
        plot.marker(record, _FAILED, f"failed, due at {record[0]:.2f} s")
    return plot


def _search(found: Found, share: float) -> Plot:
    """Share of the requests within the SLO at each rate that was probed."""
    counted = [probe for probe in found.probes if probe.requests and probe.keeps_up and not probe.interrupted]
    points: list[Point] = sorted((probe.rate, 100 * probe.good / probe.requests) for probe in counted)
    rates = [rate for rate, _ in points]
    x = Axis.over("offered requests/s", rates or [0.0, 1.0], air=0.05, wanted=7)
    y = Axis(f"requests within the SLO, % (needed: {share * 100:g})", [0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    result = "No rate met the SLO" if found.rate is None else f"Highest rate within the SLO: {found.rate:.4g} requests/s"
    plot = Plot("search", result, f"{result}. {len(points)} probes.", x, y, [("meets it", _FIRST), ("fails", _WHOLE)])
    if rates:
        plot.levels([(f"needed: {percent(share)}", 100 * share, _LEVEL)])
    for rate, good in points:
        passing = found.rate is not None and rate <= found.rate
        plot.marker((rate, good), _FIRST if passing else _WHOLE, f"{rate:.4g} requests/s: {good:.1f} %")
    return plot


def _unit(longest: float) -> tuple[float, str]:
    return (1000.0, "ms") if longest < 1 else (1.0, "s")
