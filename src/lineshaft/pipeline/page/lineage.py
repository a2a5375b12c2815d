"""Where each artifact came from: boxes in rows, arrows from parents to children, drawn from the manifests alone.

An artifact's row is one below its lowest parent. An arrow that crosses rows gets a lane in each of them, shared by all
arrows of the same parent, so that no arrow runs under a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lineshaft.pipeline.outcome import Node, Outcome
from lineshaft.pipeline.page.plots import Figure
from lineshaft.pipeline.page.svg import Drawing, shortened
from lineshaft.pipeline.page.units import duration

BOX_WIDTH, BOX_HEIGHT = 236.0, 78.0
LANE_WIDTH, GAP, ROW_GAP = 10.0, 26.0, 38.0
HALF_MARGIN = 8.0


@dataclass
class Slot:
    """A place in a row: an artifact's box, or a lane through which the arrows of `owner` pass."""

    owner: str
    lane: bool
    x: float = 0.0
    """Middle."""
    feeds: set[str] = field(default_factory=set)
    """Ids of the artifacts that arrows through this slot lead to."""

    @property
    def width(self) -> float:
        """What it takes of the row."""
        return LANE_WIDTH if self.lane else BOX_WIDTH


def lineage_figure(outcome: Outcome) -> Figure:
    """The graph of this run's artifacts. Parents from outside the run are drawn as empty boxes with their id."""
    nodes = {node.artifact.id: node for node in outcome.nodes}
    parents = {key: sorted(set(node.artifact.manifest.parents.values())) for key, node in nodes.items()}
    if not nodes:
        return Figure("Lineage", None, "This run has no artifacts.")
    rows = place(parents)
    sources = {key: ", ".join(_name(nodes, parent) for parent in above) for key, above in parents.items()}
    told = [f"{node.name} from {sources[key] or 'outside the store'}" for key, node in nodes.items()]
    height = len(rows) * (BOX_HEIGHT + ROW_GAP) - ROW_GAP + 2 * HALF_MARGIN
    width = max(_row_width(row) for row in rows) + 2 * HALF_MARGIN
    drawing = Drawing("lineage", "Lineage of the artifacts", "; ".join(told) + ".", width=width, height=height)
    _arrows(drawing, rows, parents, width / 2)
    for number, row in enumerate(rows):
        for slot in row:
            if not slot.lane:
                _box(drawing, slot.owner, nodes.get(slot.owner), slot.x + width / 2, _top(number))
    caption = "Each arrow leads from a parent to what was made from it. An id is a hash of stage, version, config and parents."
    return Figure("Lineage", drawing.write(), caption)


def place(parents: Mapping[str, Sequence[str]]) -> list[list[Slot]]:
    """Rows of slots with their places, the middle of each row at 0. `parents`: artifact id to ids; unknown ids become roots."""
    depth = _depths(parents)
    lowest = {key: max([depth[child] for child, above in parents.items() if key in above], default=depth[key]) for key in depth}
    rows: list[list[Slot]] = [[] for _ in range(max(depth.values()) + 1)]
    for key, own in depth.items():
        rows[own].append(Slot(key, lane=False))
        for below in range(own + 1, lowest[key]):
            rows[below].append(Slot(key, lane=True))
    above: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda slot: (_wish(slot, parents, above), slot.lane))  # equal wishes: the order of execution
        start = -_row_width(row) / 2
        for slot in row:
            slot.x = start + slot.width / 2
            start += slot.width + GAP
            above[slot.owner] = slot.x
    return rows


def _depths(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Row of each artifact. Parents are made before children, so this ends; order is that of `parents`, roots from outside first."""
    outside = {key for above in parents.values() for key in above} - parents.keys()
    depth = dict.fromkeys(sorted(outside), 0)

    def row(key: str) -> int:
        if key not in depth:
            depth[key] = 1 + max((row(parent) for parent in parents[key]), default=-1)
        return depth[key]

    for key in parents:
        row(key)
    return depth


def _wish(slot: Slot, parents: Mapping[str, Sequence[str]], above: Mapping[str, float]) -> float:
    """Where the slot would like to stand: below its own lane, or in the middle of its parents."""
    if slot.lane:
        return above.get(slot.owner, 0.0)
    places = [above[parent] for parent in parents.get(slot.owner, ())]
    return sum(places) / len(places) if places else 0.0


def _row_width(row: Sequence[Slot]) -> float:
    return sum(slot.width for slot in row) + GAP * (len(row) - 1)


def _top(row: int) -> float:
    return HALF_MARGIN + row * (BOX_HEIGHT + ROW_GAP)


def _arrows(drawing: Drawing, rows: Sequence[Sequence[Slot]], parents: Mapping[str, Sequence[str]], middle: float) -> None:
    """Segments from row to row: each slot below is joined to the slots of its parents (or of its own lane) just above."""
    for number, row in enumerate(rows[1:], 1):
        above = {slot.owner: slot for slot in rows[number - 1]}
        for slot in row:
            sources = [slot.owner] if slot.lane else [parent for parent in parents.get(slot.owner, ()) if parent in above]
            for order, source in enumerate(sorted(sources, key=lambda key: above[key].x)):
                fan = 0.0 if slot.lane else (order - (len(sources) - 1) / 2) * 22  # arrowheads side by side
                start = (above[source].x + middle, _top(number) - ROW_GAP)
                _segment(drawing, start, (slot.x + fan + middle, _top(number)), lane=slot.lane)


def _segment(drawing: Drawing, start: tuple[float, float], end: tuple[float, float], *, lane: bool) -> None:
    """A curve down to the next row: on through the row when it ends in a lane, with an arrowhead when it ends at a box."""
    (x0, y0), (x1, y1) = start, end
    bend = ROW_GAP / 2
    tail = f"V{y1 + BOX_HEIGHT:.1f}" if lane else ""
    drawing.add("path", d=f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}{tail}", css="edge")
    if not lane:
        drawing.add("path", d=f"M{x1:.1f} {y1:.1f}l-4 -8h8z", css="arrow")


def _box(drawing: Drawing, artifact_id: str, node: Node | None, middle: float, top: float) -> None:
    """Name, time, kind and stage, id, digest. `node` None: an artifact from outside this run."""
    left = middle - BOX_WIDTH / 2
    css = "box outside" if node is None else "box cached" if node.cached else "box"
    drawing.add("rect", x=left, y=top, width=BOX_WIDTH, height=BOX_HEIGHT, rx=7, css=css)
    if node is None:
        drawing.add("text", "from outside this run", x=left + 12, y=top + 20, css="tick")
        drawing.add("text", artifact_id, x=left + 12, y=top + 42, css="mono")
        return
    made = node.artifact.manifest
    drawing.add("text", shortened(node.name, 21), x=left + 12, y=top + 20, css="name")
    spent = "cached" if node.cached else duration(node.seconds)
    drawing.add("text", spent, x=left + BOX_WIDTH - 12, y=top + 20, css="tick", text_anchor="end")
    drawing.add("text", shortened(f"{made.kind} made by {made.stage}", 36), x=left + 12, y=top + 36)
    drawing.add("text", artifact_id, x=left + 12, y=top + 53, css="mono")
    drawing.add("text", f"digest {made.digest[:16]}", x=left + 12, y=top + 69, css="mono")


def _name(nodes: Mapping[str, Node], artifact_id: str) -> str:
    return nodes[artifact_id].name if artifact_id in nodes else artifact_id
