"""What a finished run hands to those who show it: the nodes of the recipe's graph with their artifacts.

`run` makes an Outcome; `summary` prints it and `page` draws it. Everything they show is read from here, so the terminal
and the page can't disagree. A recipe may leave nodes out: what is missing comes back as None or an empty list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lineshaft.base.store import Artifact
from lineshaft.evaluate.compared import compared
from lineshaft.evaluate.lost import Compared
from lineshaft.records.exchange import Exchange, Timing, read_exchanges
from lineshaft.records.report import Measured, Report, read_report

HISTORY_FILE = "history.jsonl"
"""In a checkpoint that we trained: one logged step a line."""


@dataclass(frozen=True)
class Node:
    """One node of the recipe's graph, done."""

    name: str
    artifact: Artifact
    cached: bool
    """The artifact was there already; nothing was computed."""
    seconds: float
    """Time that this run spent on it; 0 when cached."""


@dataclass(frozen=True)
class Variant:
    """One checkpoint that was evaluated, with both halves of its report."""

    label: str
    """The report's node without `evaluate_`: `base`, `compressed`."""
    node: Node
    """The report."""
    report: Report
    measured: Measured
    checkpoint: Artifact | None
    """The checkpoint reported on, or None when it was not made by this run's nodes."""

    @property
    def metrics(self) -> dict[str, float]:
        """Catalogue name to value, what is hashed and what was measured together."""
        return self.report.metrics | self.measured.metrics

    @property
    def compressed(self) -> bool:
        """Whether the checkpoint was made from another checkpoint."""
        return self.checkpoint is not None and any(parent.startswith("checkpoint-") for parent in self.checkpoint.manifest.parents.values())


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    recipe: str
    seed: int
    nodes: list[Node]
    """In order of execution."""

    def node(self, name: str) -> Node | None:
        """The node of this name, if the recipe has it."""
        return next((node for node in self.nodes if node.name == name), None)

    def of_kind(self, kind: str) -> list[Node]:
        """The nodes that made artifacts of this kind."""
        return [node for node in self.nodes if node.artifact.manifest.kind == kind]

    def facts(self, name: str) -> dict[str, Any]:
        """Facts of the named node's artifact; empty when the recipe has no such node."""
        node = self.node(name)
        return node.artifact.manifest.facts if node else {}

    def variants(self) -> list[Variant]:
        """Every evaluated checkpoint, the uncompressed one first: the others are compared with it."""
        checkpoints = {node.artifact.id: node.artifact for node in self.of_kind("checkpoint")}
        found = []
        for node in self.of_kind("report"):
            report, measured = read_report(node.artifact)
            found.append(Variant(node.name.removeprefix("evaluate_"), node, report, measured, checkpoints.get(report.subject)))
        return sorted(found, key=lambda variant: variant.compressed)

    @cached_property
    def comparisons(self) -> list[tuple[str, Compared]]:
        """Each compressed variant beside the first one: its label, and what it lost. Kept, as resampling takes half a second for each."""
        variants = self.variants()
        pairs = [(item.label, compared(variants[0].node.artifact, item.node.artifact)) for item in variants[1:]]
        return [(label, found) for label, found in pairs if found is not None]

    def history(self) -> list[dict[str, Any]]:
        """The logged training steps (`step`, `loss`, ...) of the first checkpoint that has them."""
        for node in self.of_kind("checkpoint"):
            path = node.artifact.path(HISTORY_FILE)
            if path.is_file():
                return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return []

    def exchanges(self) -> list[tuple[Exchange, Timing]]:
        """What the served model was asked and what it answered."""
        return [pair for node in self.of_kind("traffic") for pair in read_exchanges(node.artifact)]

    def dropped(self) -> dict[str, int]:
        """Documents dropped by reason, most frequent first; reasons that never applied are left out."""
        counts: dict[str, int] = self.facts("data").get("dropped", {})
        return {reason: count for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count}
