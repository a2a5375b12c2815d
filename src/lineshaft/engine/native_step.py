"""A step by native kernels: the model's ops recorded once, then replayed for every plan."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.base.errors import Unrecordable
from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.native_attend import NativeAttend
from lineshaft.model.decoder import Decoder
from lineshaft.model.rope import speeds
from lineshaft.ops import table as ops
from lineshaft.ops.recording import Recorded
from lineshaft.sched.plan import Plan


class NativeStep:
    """Runs plans. Where an operation of PyTorch stands between the kernels, op by op; `obstacle` names it then."""

    def __init__(self, model: Decoder, cache: PagedCache, step_tokens: int, requests: int) -> None:
        """`step_tokens`, `requests`: most of one plan; a larger step makes it grow."""
        self.model, self.cache = model, cache
        self._buffers = StepBuffers(len(cache.groups), cache.page_tokens, step_tokens, requests)
        self.obstacle: str | None = None
        self._recorded = self._record()

    def run(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """See Runner.run."""
        if self._buffers.fill(plan):
            self._recorded = None  # it knows places that are gone, and its memory can go first
        if self._recorded is None and self.obstacle is None:
            self._recorded = self._record()
        tokens, rows = self._buffers.tokens, self._buffers.rows
        if (recorded := self._recorded) is None:
            return self._op_by_op(tokens, rows)
        recorded.run(tokens, rows)
        return recorded.output[:tokens], recorded.finished[:rows]

    @torch.inference_mode()
    def _op_by_op(self, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
        with ops.steady():
            hidden_TI = self._hidden(tokens)
            return hidden_TI, self._logits(hidden_TI, rows)

    @torch.inference_mode()
    def _record(self) -> Recorded | None:
        speeds(self.model.config, torch.device("cpu"))  # worked out once, by PyTorch
        buffers = self._buffers
        try:
            with ops.steady():
                return Recorded(lambda: self._hidden(buffers.capacity), lambda hidden_TI: self._logits(hidden_TI, buffers.most_rows))
        except Unrecordable as found:
            self.obstacle = str(found)
            return None

    def _hidden(self, tokens: int) -> Tensor:
        buffers = self._buffers
        return self.model.hidden(buffers.tokens_T[:tokens], buffers.positions_T[:tokens], NativeAttend(self.cache, buffers, tokens))

    def _logits(self, hidden_TI: Tensor, rows: int) -> Tensor:
        return self.model.logits(ops.embed(self._buffers.rows_R[:rows], hidden_TI)).float()

    def told(self) -> str:
        """For people."""
        if self._recorded is None:
            return f"steps run op by op: {self.obstacle} is PyTorch's"
        return f"steps are recorded: {len(self._recorded)} native calls, {self._recorded.arena.size >> 20} MiB of buffers"
