"""Root-mean-square normalisation (Zhang and Sennrich 2019), and layer normalisation (Ba et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineshaft.ops import table as ops


class RmsNorm(nn.Module):
    """Scale the last dimension to unit root mean square, then by a learnt weight."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`; computed in float32."""
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Take the mean off the last dimension, scale it to unit variance, then by a learnt weight, and add a learnt bias."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x_TI: Tensor) -> Tensor:
        """Same shape and dtype as `x_TI`; computed in float32."""
        return ops.layer_norm(x_TI, self.weight, self.bias, self.eps)
