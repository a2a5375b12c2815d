"""A step by native kernels: the model's ops recorded once, then replayed for every plan."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.base.errors import Unrecordable
from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.native_attend import NativeAttend
from lineshaft.engine.program import Program
from lineshaft.model.decoder import Decoder
from lineshaft.model.rope import speeds
from lineshaft.ops import table as ops
from lineshaft.ops.recording import Recorded


class NativeStep:
    """The program of a model over a cache. Where an operation of PyTorch stands between the kernels there is none, and plans run op by
    op; `obstacle` names it then."""

    def __init__(self, model: Decoder, cache: PagedCache, buffers: StepBuffers) -> None:
        self.model, self.cache, self.buffers = model, cache, buffers
        self.obstacle: str | None = None
        self.recorded = self._record()
        self.program = self._program()

    @torch.inference_mode()
    def op_by_op(self) -> Tensor:
        """Final hidden states [T, hidden] of what the buffers hold."""
        with ops.steady():
            return self._hidden(self.buffers.tokens)

    @torch.inference_mode()
    def _record(self) -> Recorded | None:
        speeds(self.model.config, torch.device("cpu"))  # worked out once, by PyTorch
        rows_R = torch.from_numpy(self.buffers.rows_R)
        try:
            with ops.steady():
                return Recorded(
                    lambda: self._hidden(self.buffers.capacity),
                    lambda hidden_TI: self.model.logits(ops.embed(rows_R, hidden_TI)).float(),
                )
        except Unrecordable as found:
            self.obstacle = str(found)
            return None

    def _program(self) -> Program | None:
        if self.recorded is None:
            return None
        hidden = self.recorded.output
        words = hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden
        return Program(self.recorded.step, self.buffers, words.numpy(), self.recorded.finished.numpy())

    def _hidden(self, tokens: int) -> Tensor:
        ids_T, positions_T = (torch.from_numpy(numbers)[:tokens] for numbers in (self.buffers.tokens_T, self.buffers.positions_T))
        return self.model.hidden(ids_T, positions_T, NativeAttend(self.cache, self.buffers, tokens))

    def told(self) -> str:
        """For people."""
        if self.recorded is None:
            return f"steps run op by op: {self.obstacle} is PyTorch's"
        return f"steps are recorded: {len(self.recorded)} native calls, {self.recorded.arena.size >> 20} MiB of buffers"
