"""Runs one plan through the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lineshaft.engine.attend import PagedAttend
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.native_attend import obstacle
from lineshaft.engine.native_step import NativeStep
from lineshaft.engine.tiles import TiledAttend
from lineshaft.model.decoder import Decoder
from lineshaft.ops import table as ops
from lineshaft.ops.steady import ROWS
from lineshaft.sched.plan import Plan


class Runner:
    """Model and cache; no memory of requests. `steady`: each request's numbers are the same bits in any company."""

    def __init__(self, model: Decoder, cache: PagedCache, steady: bool = True, step_tokens: int = 64, requests: int = 16) -> None:
        self.model, self.cache, self.steady = model, cache, steady
        self.native: NativeStep | None = None
        if steady and obstacle(model.config) is None:
            self.native = NativeStep(model, cache, step_tokens, requests)
        assert self.native is not None or not cache.coded  # see cache_dtype

    def run(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Final hidden states [T, hidden] of the plan's tokens, whose keys are in the cache afterwards; and float32 logits [R, vocabulary]
        that choose a token for each of `plan.sampling`. Both are good until the next run."""
        for group, source, target in plan.copies:
            self.cache.copy(group, source, target)
        if self.native is not None:
            return self.native.run(plan)
        hidden_TI = self._hidden(plan)
        return hidden_TI, self.logits(hidden_TI, plan.sampling_rows)

    @torch.inference_mode()
    def logits(self, hidden_TI: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [R, vocabulary] in float32 of some rows."""
        with ops.steady(self.steady):
            return self.model.logits(hidden_TI[torch.tensor(rows, dtype=torch.int64)]).float()

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
