"""Rotary position angles (Su et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.model.config import ModelConfig
from lineshaft.ops import table as ops


@dataclass(frozen=True)
class Rotation:
    """The angles of one batch: worked out once, used by every layer."""

    cos_TR: Tensor
    sin_TR: Tensor
    interleaved: bool

    def __call__(self, x_THD: Tensor) -> Tensor:
        """Rotate every head of every token by the angles of its position."""
        return ops.rope(x_THD, self.cos_TR, self.sin_TR, self.interleaved)


def rotation(config: ModelConfig, positions_T: Tensor) -> Rotation:
    """Angles position * theta^(-2i/D), in float32, for int64 positions [T].

    Rounded in the order in which transformers rounds: at long range another order turns by visibly other angles.
    """
    steps_R = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    speed_R = 1.0 / config.rope_theta ** (steps_R / config.rotary_dim)
    angles_TR = positions_T.float()[:, None] * speed_R
    return Rotation(angles_TR.cos(), angles_TR.sin(), config.rope_interleaved)
