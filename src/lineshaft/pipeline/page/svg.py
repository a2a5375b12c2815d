"""Small drawings as inline SVG: axes with round ticks, lines, steps, points, levels, bars, a legend.

A drawing is a tree of XML elements, so its text is escaped by construction. Colours are CSS classes (`s0` to `s5`, set by
the page for both colour schemes from a palette that colour-blind readers can tell apart); dashes and marker shapes carry
the same information a second time. Lengths are in SVG user units, which the page shows at about one pixel each.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement, tostring

from lineshaft.pipeline.page.units import printable

Point = tuple[float, float]
WIDTH, HEIGHT = 560.0, 350.0
LEFT, RIGHT, BOTTOM = 64.0, 18.0, 52.0
ROW = 18.0
"""Height of one line of text."""
SERIES = 6
"""Number of colours; the seventh series takes the first again, with the same dash."""
_STEPS = (1, 2, 5, 10)
_DASHES = ("", "7 4", "2 4", "10 4 2 4", "4 3", "12 5")


def nice_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers, equally spaced by 1, 2 or 5 times a power of ten, about `wanted` of them, that cover [low, high].

    The first is <= low and the last >= high. An empty or tiny interval is widened, so there are always two or more.
    """
    low, high = min(low, high), max(low, high)
    least = max(abs(low), abs(high), 1e-9) * 1e-6
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    raw = (high - low) / max(1, wanted - 1)
    power = math.floor(math.log10(raw))
    base = next(step for step in _STEPS if step * 10.0**power >= raw * (1 - 1e-9))

    def tick(number: int) -> float:
        return number * base * 10.0**power if power >= 0 else number * base / 10.0**-power  # dividing gives 0.3, not 0.30000000000000004

    first, last = math.floor(low / tick(1)), math.ceil(high / tick(1))
    first -= tick(first) > low  # the quotient was rounded
    last += tick(last) < high
    return [tick(number) for number in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick with just the decimals its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}" if decimals <= 8 and abs(value) < 1e9 else f"{value:g}"


@dataclass(frozen=True)
class Axis:
    """One direction of a plot: its label with the unit, and its ticks, the first and last of which are the ends."""

    label: str
    ticks: list[float]

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, zero: bool = False, air: float = 0.0, wanted: int = 6) -> Axis:
        """An axis that covers `values`, with 0 where the drawing would mislead without it.

        `air` is the share of the range to keep free at both ends (but for an end at 0), so that no marker sits on the frame.
        """
        every = [*values, *([0.0] if zero else [])]
        low, high = min(every), max(every)
        margin = (high - low) * air
        return cls(label, nice_ticks(low - margin if low else low, high + margin if high else high, wanted))

    def at(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def texts(self) -> list[str]:
        """The ticks' labels."""
        return [tick_text(tick, self.ticks[1] - self.ticks[0]) for tick in self.ticks]


@dataclass
class Drawing:
    """An SVG with a title and a description, which screen readers read and browsers show on hovering."""

    name: str
    """Unique on the page; prefix of the element ids."""
    title: str
    summary: str
    """What a reader who can't see the drawing should know."""
    width: float = WIDTH
    height: float = HEIGHT
    root: Element = field(init=False)

    def __post_init__(self) -> None:
        ids = f"{self.name}-title {self.name}-desc"
        self.root = Element("svg", {"viewBox": f"0 0 {_n(self.width)} {_n(self.height)}", "role": "img", "aria-labelledby": ids})
        self.root.set("width", _n(self.width))  # a browser without our CSS still shows the right size
        _put(self.root, "title", self.title, id=f"{self.name}-title")
        _put(self.root, "desc", self.summary, id=f"{self.name}-desc")

    def add(self, tag: str, text: str = "", **attributes: str | float) -> Element:
        """A new element at the end, so on top. Underscores in names become dashes; `css` is the class."""
        return _put(self.root, tag, text, **attributes)

    def write(self) -> str:
        """The SVG as text."""
        return tostring(self.root, encoding="unicode")


class Plot(Drawing):
    """A drawing with two axes. Build it, draw into it from back to front, finish with `write`."""

    def __init__(self, name: str, title: str, summary: str, x: Axis, y: Axis, legend: Sequence[tuple[str, int]] = ()) -> None:
        """`legend`: label and series number of each entry; entries flow into as many rows as they need."""
        super().__init__(name, title, summary)
        self.x, self.y = x, y
        self.left = max(LEFT, 30 + max(text_width(text, 12) for text in y.texts()))
        self.top = 12.0 + self._legend(legend)
        self._axes()

    def at(self, point: Point) -> Point:
        """Values to user units."""
        across, up = self.x.at(point[0]), self.y.at(point[1])
        return self.left + across * (self.width - RIGHT - self.left), self.height - BOTTOM - up * (self.height - BOTTOM - self.top)

    def line(self, points: Sequence[Point], series: int, css: str = "line") -> None:
        """A polyline through `points`."""
        path = "M" + "L".join(f"{_n(across)} {_n(down)}" for across, down in map(self.at, points))
        dash = _DASHES[series % SERIES] if css == "line" else ""
        self.add("path", d=path, css=f"{css} s{series % SERIES}", **({"stroke_dasharray": dash} if dash else {}))

    def levels(self, levels: Sequence[tuple[str, float, int]]) -> None:
        """Horizontal reference lines as (label, value, series), each labelled at its right end."""
        ends = [self.at((self.x.ticks[-1], value)) for _, value, _ in levels]
        downs = spread([down - 6 for _, down in ends], ROW - 2, self.top + 10, self.height - BOTTOM - 4)
        for (label, _, series), (right, down), label_down in zip(levels, ends, downs, strict=True):
            self.add("path", d=f"M{_n(self.left)} {_n(down)}H{_n(right)}", css=f"level s{series % SERIES}", stroke_dasharray="6 4")
            self.add("text", label, x=right - 4, y=label_down, css="label", text_anchor="end")

    def marker(self, point: Point, series: int, tip: str) -> None:
        """A marker in the series' shape; `tip` is shown on hovering."""
        across, down = self.at(point)
        _put(self.add("path", d=marker_path(across, down, series), css=f"marker s{series % SERIES}"), "title", tip)

    def notes(self, notes: Sequence[tuple[Point, str]]) -> None:
        """A text beside each point, on the side with more room, moved up or down where two would overlap."""
        middle = (self.left + self.width) / 2
        for side, anchor, shift in ((False, "start", 10), (True, "end", -10)):
            here = [(*self.at(point), text) for point, text in notes if (self.at(point)[0] > middle) == side]
            downs = spread([down + 4 for _, down, _ in here], ROW - 3, self.top + 10, self.height - BOTTOM - 4)
            for (across, _, text), down in zip(here, downs, strict=True):
                self.add("text", text, x=across + shift, y=down, css="label", text_anchor=anchor)

    def _legend(self, entries: Sequence[tuple[str, int]]) -> float:
        """Draw the legend and return the height it takes."""
        across, row = 8.0, 0
        for label, series in entries:
            wide = 44 + text_width(label, 12)
            if across > 8 and across + wide > self.width:
                across, row = 8.0, row + 1
            middle = 12 + row * ROW
            dash = _DASHES[series % SERIES]
            attributes = {"stroke_dasharray": dash} if dash else {}
            self.add("path", d=f"M{_n(across)} {_n(middle)}h24", css=f"line s{series % SERIES}", **attributes)
            self.add("path", d=marker_path(across + 12, middle, series), css=f"marker s{series % SERIES}")
            self.add("text", label, x=across + 30, y=middle + 4)
            across += wide
        return (row + 1) * ROW + 4 if entries else 0.0

    def _axes(self) -> None:
        right, floor = self.width - RIGHT, self.height - BOTTOM
        for tick, text in zip(self.y.ticks, self.y.texts(), strict=True):
            _, down = self.at((self.x.ticks[0], tick))
            self.add("path", d=f"M{_n(self.left)} {_n(down)}H{_n(right)}", css="grid")
            self.add("text", text, x=self.left - 8, y=down + 4, css="tick", text_anchor="end")
        for tick, text in zip(self.x.ticks, self.x.texts(), strict=True):
            across, _ = self.at((tick, self.y.ticks[0]))
            self.add("path", d=f"M{_n(across)} {_n(floor)}v5", css="axis")
            self.add("text", text, x=across, y=floor + 19, css="tick", text_anchor="middle")
        self.add("path", d=f"M{_n(self.left)} {_n(floor)}H{_n(right)}", css="axis")
        self.add("text", self.x.label, x=(self.left + right) / 2, y=self.height - 10, css="axis-label", text_anchor="middle")
        middle = (self.top + floor) / 2
        turn = f"rotate(-90 15 {_n(middle)})"
        self.add("text", self.y.label, x=15, y=middle, css="axis-label", text_anchor="middle", transform=turn)


def bars(name: str, title: str, summary: str, rows: Sequence[tuple[str, float, str]]) -> Drawing:
    """Horizontal bars from (label, length, text behind the bar); the longest fills the width."""
    step = min(52.0, max(30.0, 300 / len(rows)))  # few bars stand as tall as the plots beside them
    half = step * 0.3
    left = 16 + max(text_width(label, 12) for label, _, _ in rows)
    room = WIDTH - left - 16 - max(text_width(text, 12) for _, _, text in rows)
    drawing = Drawing(name, title, summary, height=step * len(rows) + 8)
    longest = max(length for _, length, _ in rows)
    for number, (label, length, text) in enumerate(rows):
        middle = step * (number + 0.5) + 4
        wide = max(1.0, room * length / longest)  # a bar too short to see would say "none"
        drawing.add("text", label, x=left - 8, y=middle + 4, text_anchor="end")
        drawing.add("rect", x=left, y=middle - half, width=wide, height=2 * half, rx=2, css="bar s0")
        drawing.add("text", text, x=left + wide + 8, y=middle + 4, css="tick")
    return drawing


def marker_path(across: float, down: float, series: int) -> str:
    """A circle, square, triangle or diamond around a point: shapes tell series apart where colours do not."""
    here = f"M{_n(across)} {_n(down)}"
    shapes = ("m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", "m-4 -4h8v8h-8z", "m0 -5.5l5 9h-10z", "m0 -6l5.5 6l-5.5 6l-5.5 -6z")
    return here + shapes[series % len(shapes)]


def text_width(text: str, font: float) -> float:
    """An estimate that errs on the wide side: there is no font here to ask. Chinese characters are square."""
    return sum(font if unicodedata.east_asian_width(char) in "WF" else font * 0.6 for char in text)


def shortened(text: str, most: int) -> str:
    """At most `most` characters, an ellipsis marking the cut."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels, near those wanted but at least `gap` apart, in the same order, from `low` on and, if they fit, up to `high`."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [0.0] * len(wanted)
    last = low - gap
    for index in order:
        last = places[index] = max(wanted[index], last + gap)
    ceiling = max(high, low + gap * (len(wanted) - 1))
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points, evenly chosen, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def _put(parent: Element, tag: str, text: str = "", **attributes: str | float) -> Element:
    values = {_attribute(key): value if isinstance(value, str) else _n(value) for key, value in attributes.items()}
    element = SubElement(parent, tag, values)
    element.text = printable(text) or None
    return element


def _attribute(key: str) -> str:
    """A Python keyword as the SVG attribute it stands for."""
    return "class" if key == "css" else key.replace("_", "-")


def _n(value: float) -> str:
    """A coordinate to a hundredth, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
