"""What is wanted of a prompt besides an answer: how likely each of its tokens was, or an embedding of the whole.

Long prompts come in chunks, so what was read of each so far is kept here until its last token is run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lineshaft.engine.program import Floats, Runs
from lineshaft.engine.sampler import score
from lineshaft.sched.plan import Chunk, Plan
from lineshaft.sched.request import Pooled, PromptScored, Request, Score


class Readings:
    """Unfinished scores and sums, by request."""

    def __init__(self) -> None:
        self._scores: dict[int, list[Score | None]] = {}
        self._sums: dict[int, npt.NDArray[np.float64]] = {}

    def take(self, plan: Plan, runs: Runs) -> list[PromptScored | Pooled]:
        """Read what the plan's step left in `runs`; what is complete with it comes back. To be called before the step is committed."""
        told: list[PromptScored | Pooled] = []
        row = 0
        for chunk in plan.chunks:
            request, size = chunk.request, chunk.last - chunk.first
            if request.task == "score" and not request.scored:
                told += self._scored(request, chunk, row, runs)
            elif request.task == "embed":
                told += self._pooled(request, chunk, runs.hidden(row, row + size))
            row += size
        return told

    def forget(self, number: int) -> None:
        """The request has ended."""
        self._scores.pop(number, None)
        self._sums.pop(number, None)

    def _scored(self, request: Request, chunk: Chunk, row: int, runs: Runs) -> list[PromptScored]:
        if chunk.first == 0:  # the beginning, perhaps once more, after it had to give way
            self._scores[request.number] = [None]
        scores, top = self._scores[request.number], request.sampling.logprobs or 0
        known = min(chunk.last, request.prompt_tokens - 1)  # the token after each of these rows is known
        for start in range(chunk.first, known, runs.most_rows):
            places = range(start, min(start + runs.most_rows, known))
            logits_RV = runs.logits([row + place - chunk.first for place in places])
            scores += [score(logits_V, request.tokens[place + 1], top) for place, logits_V in zip(places, logits_RV, strict=True)]
        if chunk.last < request.prompt_tokens:
            return []
        request.scored = True
        return [PromptScored(request.number, self._scores.pop(request.number))]

    def _pooled(self, request: Request, chunk: Chunk, hidden_TI: Floats) -> list[Pooled]:
        """In float64, where the order of adding, which hangs on the chunks, does not show in float32."""
        own = hidden_TI.astype(np.float64).sum(0)
        self._sums[request.number] = own if chunk.first == 0 else self._sums[request.number] + own
        if not chunk.ends:
            return []
        mean = self._sums.pop(request.number) / request.prompt_tokens
        return [Pooled(request.number, mean.astype(np.float32).tolist())]
