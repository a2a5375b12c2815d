"""Small weights that a choice or a factor hangs on: never compressed, and packed for the native kernels beside themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lineshaft.ops.packing import Shape, pack_dense


class Scorer(nn.Module):
    """A weight [O, I] that is no Linear: it is saved as it is, whatever its packed form says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.packed: tuple[Shape, Tensor] | None = None

    def packable(self) -> Tensor:
        """What is packed: in float32, where a choice hangs on it."""
        return self.weight.detach().float()

    def pack(self) -> None:
        """Lay the weight out for the native kernels, where they can take it; training would not see it."""
        if self.packed is None:
            self.packed = pack_dense(self.packable())
