"""Runs plans through the model: by the recorded program where there is one, else op by op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lineshaft.engine.attend import PagedAttend
from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.native_attend import obstacle
from lineshaft.engine.native_step import NativeStep
from lineshaft.engine.program import Choices, Floats
from lineshaft.engine.tiles import TiledAttend
from lineshaft.model.decoder import Decoder
from lineshaft.ops import table as ops
from lineshaft.ops.steady import ROWS
from lineshaft.sched.plan import Plan


class Runner:
    """Model and cache; no memory of requests. `steady`: each request's numbers are the same bits in any company. Implements Runs."""

    def __init__(
        self, model: Decoder, cache: PagedCache, steady: bool = True, step_tokens: int = 64, requests: int = 16, context_tokens: int = 4096
    ) -> None:
        """`step_tokens`, `requests`: most of one plan, of `context_tokens` each at most."""
        self.model, self.cache, self.steady, self.most_rows = model, cache, steady, requests
        self.native: NativeStep | None = None
        if steady and obstacle(model.config) is None:
            self.native = NativeStep(model, cache, StepBuffers(len(cache.groups), cache.page_tokens, step_tokens, requests, context_tokens))
        assert self.native is not None or not cache.coded  # see cache_dtype
        self._program = self.native.program if self.native else None
        self._hidden_TI = torch.empty(0)
        """Of the plan that was run last, where no program holds them."""

    def run(self, plan: Plan) -> Floats:
        """See Runs."""
        for group, source, target in plan.copies:
            self.cache.copy(group, source, target)
        if self.native is not None:
            self.native.buffers.fill(plan)
        if self._program is not None:
            return self._program.run()
        self._hidden_TI = self.native.op_by_op() if self.native is not None else self._hidden(plan)
        return self.logits(plan.sampling_rows)

    @torch.inference_mode()
    def logits(self, rows: Sequence[int]) -> Floats:
        """See Runs."""
        if self._program is not None:
            return self._program.logits(rows)
        with ops.steady(self.steady):
            logits: Floats = self.model.logits(self._hidden_TI[torch.tensor(rows, dtype=torch.int64)]).float().numpy()
        return logits

    def hidden(self, first: int, last: int) -> Floats:
        """See Runs."""
        if self._program is not None:
            return self._program.hidden(first, last)
        hidden: Floats = self._hidden_TI[first:last].float().numpy()
        return hidden

    def draw(self, logits_RV: Floats, choices_R5: Choices) -> list[int]:
        """See Runs."""
        return drawn(logits_RV, choices_R5)

    @torch.inference_mode()
    def _hidden(self, plan: Plan) -> Tensor:
        tokens = [token for chunk in plan.chunks for token in chunk.request.tokens[chunk.first : chunk.last]]
        positions = [position for chunk in plan.chunks for position in range(chunk.first, chunk.last)]
        if not self.steady:
            return self.model.hidden(torch.tensor(tokens), torch.tensor(positions), PagedAttend(self.cache, plan))
        extra = [0] * (-len(tokens) % ROWS)  # rows that belong to nobody
        with ops.steady():
            attend = TiledAttend(self.cache, plan)
            return self.model.hidden(torch.tensor(tokens + extra), torch.tensor(positions + extra), attend)[: len(tokens)]


def drawn(logits_RV: Floats, choices_R5: Choices) -> list[int]:
    """A token for each row, by the native kernel or its reference."""
    with ops.steady():
        tokens: list[int] = ops.sample(torch.from_numpy(logits_RV), torch.from_numpy(choices_R5)).tolist()
    return tokens
