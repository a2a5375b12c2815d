"""What a model lost against another one, from the reports of both: each difference with the interval that documents leave open.

Shape letters: D documents, of number, nats, tokens and correct ones (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact
from lineshaft.evaluate.statistics import Floats, Interval, Verdict, compare, share_of
from lineshaft.records.report import read_greedy, read_report


@dataclass(frozen=True)
class Compared:
    """A report beside that of another model on the same text. Intervals hold with 95 % for documents like these."""

    documents: int
    loss: Interval
    """Rise of the loss, as a share of the other's."""
    misses: Interval
    """Rise of the share of tokens that were not the most likely one, in tokens a token."""
    agreement: Interval | None
    """Share of places where both find the same token the most likely one; None where a report does not hold them."""

    @property
    def verdict(self) -> Verdict:
        """Of the loss."""
        return self.loss.verdict()

    def table(self) -> dict[str, Any]:
        """For JSON."""
        named = {"loss_rise_share": self.loss, "misses_rise": self.misses, "greedy_agreement": self.agreement}
        shown = {name: {"estimate": found.estimate, "low": found.low, "high": found.high} for name, found in named.items() if found}
        return {"documents": self.documents, "verdict": self.verdict, **shown}

    def sentence(self) -> str:
        """For people."""
        loss = f"loss {self.loss.estimate:+.2%} (95 % interval {self.loss.low:+.2%} to {self.loss.high:+.2%}: {self.verdict})"
        low, middle, high = (-100 * end for end in (self.misses.high, self.misses.estimate, self.misses.low))
        right = f"next token right {middle:+.2f} points ({low:+.2f} to {high:+.2f})"
        found = self.agreement
        same = "" if found is None else f", the same greedy token at {found.estimate:.1%} of places ({found.low:.1%} to {found.high:.1%})"
        return f"{loss}, {right}{same}; {self.documents:,} documents."


def compared(old: Artifact, new: Artifact) -> Compared | None:
    """The report `new` beside `old`; None where either holds no documents, or fewer than two.

    Raises ConfigError where they are about different texts.
    """
    before, after = read_report(old)[0].documents, read_report(new)[0].documents
    if len(before) < 2 or not after:
        return None
    old_D4, new_D4 = np.array(before), np.array(after)
    if not np.array_equal(old_D4[:, [0, 2]], new_D4[:, [0, 2]]):
        raise ConfigError(f"{old.id} and {new.id} were measured on different texts: evaluate both on the same tokens, rows as long")
    tokens_D = old_D4[:, 2]
    miss = compare(np.maximum(tokens_D - old_D4[:, 3], 1e-9), tokens_D - new_D4[:, 3], tokens_D).difference
    return Compared(len(tokens_D), compare(old_D4[:, 1], new_D4[:, 1], tokens_D).rise, miss, _agreement(old, new, tokens_D))


def _agreement(old: Artifact, new: Artifact, tokens_D: Floats) -> Interval | None:
    ours, theirs = read_greedy(new), read_greedy(old)
    if ours is None or theirs is None:
        return None
    ends = np.cumsum(tokens_D).astype(int)
    same = np.concatenate([[0], np.cumsum(ours == theirs)])
    return share_of(np.diff(same[np.concatenate([[0], ends])]), tokens_D)
