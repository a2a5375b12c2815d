"""Drawings below each other in one SVG file, each under its title, for light and dark pages; used by the scripts with `--plot`."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree.ElementTree import Element, SubElement, tostring

from lineshaft.pipeline.page.svg import WIDTH, Drawing

_STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; background: #ffffff; } text { fill: #1b1f24; }
.tick { fill: #57606a; } .label { font-size: 11px; } .title { font-size: 15px; font-weight: 600; }
.bar { fill: #0063a6; } .ground { fill: #ffffff; } .line, .axis, .grid { fill: none; } .line { stroke-width: 1.5; }
.axis { stroke: #57606a; } .grid { stroke: #d8dee4; }
.s0 { stroke: #0063a6; } .s1 { stroke: #b8500f; } .s2 { stroke: #1a7f37; } .marker { fill: #ffffff; stroke-width: 2; }
@media (prefers-color-scheme: dark) { svg { background: #1c2024; } text { fill: #e6e8ea; } .tick { fill: #a3abb3; }
.bar { fill: #6cbcf5; } .ground, .marker { fill: #1c2024; } .grid { stroke: #3a4046; } .axis { stroke: #a3abb3; }
.s0 { stroke: #6cbcf5; } .s1 { stroke: #f0a070; } .s2 { stroke: #6fd08c; } }
"""
_TITLE = 30.0


def stacked(titled: Iterable[tuple[str, Drawing]]) -> str:
    """(title, drawing) from top to bottom, as the text of a file."""
    root, top = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "width": f"{WIDTH:g}"}), 0.0
    SubElement(root, "style").text = _STYLE
    SubElement(root, "rect", {"class": "ground", "width": "100%", "height": "100%"})
    for title, drawing in titled:
        SubElement(root, "text", {"class": "title", "x": "8", "y": f"{top + 20:g}"}).text = title
        for name, length in (("y", top + _TITLE), ("height", drawing.height)):  # else it is as large as the whole picture
            drawing.root.set(name, f"{length:g}")
        root.append(drawing.root)
        top += drawing.height + _TITLE
    root.set("viewBox", f"0 0 {WIDTH:g} {top:g}")
    return tostring(root, encoding="unicode") + "\n"
