"""A step as a list of native calls over buffers at fixed places: laid out, run, read. Free of torch, which only records it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lineshaft.engine.buffers import StepBuffers
from lineshaft.sched.plan import Plan

Floats = npt.NDArray[np.float32]
Choices = npt.NDArray[np.float64]


class Runs(Protocol):
    """What an engine needs of whatever runs its plans. Arrays are good until the next call."""

    most_rows: int
    """Whose logits are held at a time."""

    def run(self, plan: Plan) -> Floats:
        """Run the plan's tokens, whose keys are in the cache afterwards. Logits [R, vocabulary] that choose a token for each of
        `plan.sampling`."""

    def logits(self, rows: Sequence[int]) -> Floats:
        """Logits [R, vocabulary] of some rows of the plan that was run last, at most `most_rows`."""

    def hidden(self, first: int, last: int) -> Floats:
        """Final hidden states [last - first, hidden] of its rows."""

    def draw(self, logits_RV: Floats, choices_R5: Choices) -> list[int]:
        """A token for each row by its choice (ops/sampling.py), -1 where no logit is a number."""


class Program:
    """Recorded calls, the buffers that they read, and where their results lie."""

    def __init__(self, step: Any, buffers: StepBuffers, hidden_TI: npt.NDArray[Any], logits_RV: Floats) -> None:
        """`step`: of the native library. `hidden_TI`: float32, or uint16 that hold bfloat16."""
        self.buffers, self._step, self._hidden_TI, self._logits_RV = buffers, step, hidden_TI, logits_RV

    def run(self) -> Floats:
        """Run what the buffers hold; logits of the rows that get some."""
        self._step.run(self.buffers.tokens, self.buffers.rows)
        return self._logits_RV[: self.buffers.rows]

    def logits(self, rows: Sequence[int]) -> Floats:
        """See Runs."""
        self.buffers.choose(rows)
        self._step.run(0, len(rows))
        return self._logits_RV[: len(rows)]

    def hidden(self, first: int, last: int) -> Floats:
        """See Runs."""
        return widened(self._hidden_TI[first:last])


def widened(numbers: npt.NDArray[Any]) -> Floats:
    """float32 as they are, and those of bfloat16 that uint16 hold: the upper half of a float32."""
    if numbers.dtype == np.float32:
        return numbers
    return (numbers.astype(np.uint32) << 16).view(np.float32)
