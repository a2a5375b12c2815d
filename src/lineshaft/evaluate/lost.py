"""What a comparison of two reports found: both models' values, what was lost, and how sure that is.

`evaluate/compared.py` works it out; the terminal, the JSON and the page all read it from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lineshaft.evaluate.statistics import Interval, Verdict
from lineshaft.evaluate.texts import NAMES, Overlap

Unit = Literal["share", "percent", "points", "score"]
"""A share of 1; a change in percent of the old value; a change of a share; a BLEU or ROUGE, or a change of one."""
LINES = (
    "loss_rise_share",
    "perplexity_rise_share",
    "misses_rise",
    "greedy_agreement",
    "same_text",
    *(f"{name}_{kind}" for kind in ("between", "drop") for name in NAMES),
)
"""Names of all lines, in their order; a comparison may lack some."""
FURTHEST = 700.0
"""Nats a token beyond which a perplexity has no number; models that far apart need no exact one."""
_SPOKEN = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(frozen=True)
class Side:
    """One of the two models, over all documents that both were scored on."""

    loss: float
    """Nats a token."""
    misses: float
    """Share of tokens that were not the most likely one."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, FURTHEST))


@dataclass(frozen=True)
class Line:
    """One line of a comparison: what both models have in common, or what the new one has lost."""

    name: str
    """In JSON."""
    words: str
    unit: Unit
    interval: Interval
    """Of a `rise`: new - old, of a `drop`: old - new, so that more is worse; otherwise of what both have in common."""
    kind: Literal["common", "rise", "drop"] = "common"
    old: float | None = None
    new: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Of this line by itself; None where nothing is lost or won."""
        return None if self.kind == "common" else self.interval.verdict()

    @property
    def shown(self) -> Interval:
        """As people read it: new - old, of a drop as well."""
        found = self.interval
        return found if self.kind != "drop" else replace(found, estimate=0 - found.estimate, low=0 - found.high, high=0 - found.low)

    def table(self) -> dict[str, Any]:
        """For JSON."""
        sides = {} if self.old is None else {"old": self.old, "new": self.new}
        told = {} if self.verdict is None else {"verdict": self.verdict}
        return sides | {"estimate": self.interval.estimate, "low": self.interval.low, "high": self.interval.high} | told


@dataclass(frozen=True)
class Compared:
    """A report beside that of another model on the same text. Intervals hold with 95 % for documents and prompts like these."""

    documents: int
    old: Side
    new: Side
    loss: Interval
    """Rise of the loss, as a share of the other's."""
    perplexity: Interval
    """Rise of the perplexity, as a share of the other's."""
    misses: Interval
    """Rise of the share of tokens that were not the most likely one, in tokens a token."""
    agreement: Interval | None
    """Share of places where both find the same token the most likely one; None where a report does not hold them."""
    texts: Overlap | None
    """Of the texts that both wrote; None where `notes` say why."""
    notes: list[str]

    @property
    def verdict(self) -> Verdict:
        """Of the loss."""
        return self.loss.verdict()

    def lines(self) -> Iterator[Line]:
        """Everything that was compared, for tables."""
        old, new = self.old, self.new
        yield Line("loss_rise_share", "loss, nats/token", "percent", self.loss, "rise", old.loss, new.loss)
        yield Line("perplexity_rise_share", "perplexity", "percent", self.perplexity, "rise", old.perplexity, new.perplexity)
        yield Line("misses_rise", "next token wrong", "points", self.misses, "rise", old.misses, new.misses)
        if self.agreement:
            yield Line("greedy_agreement", "same greedy token", "share", self.agreement)
        if texts := self.texts:
            yield Line("same_text", "same text", "share", texts.same)
            for name in NAMES:
                yield Line(f"{name}_between", f"{_SPOKEN[name]} between both", "score", texts.between[name])
            for name in NAMES:
                words = f"{_SPOKEN[name]} to held-out"
                yield Line(f"{name}_drop", words, "score", texts.drop[name], "drop", texts.old[name], texts.new[name])

    def table(self) -> dict[str, Any]:
        """For JSON."""
        found = self.texts
        texts = {} if found is None else {"prompts": found.prompts, "script": found.script, "bleu_signature": found.signature}
        lines = {line.name: line.table() for line in self.lines()}
        return {"documents": self.documents, "verdict": self.verdict, **lines, **texts, "notes": self.notes}

    def caption(self) -> str:
        """What the intervals are over, and how texts were cut into words."""
        if self.texts is None:
            return f"In brackets: 95 % intervals over {self.documents:,} documents."
        over = f"95 % intervals over {self.documents:,} documents, and over {self.texts.prompts:,} prompts for texts"
        return f"In brackets: {over}. BLEU: {self.texts.signature}; ROUGE: F1, words of {self.texts.script} text."
