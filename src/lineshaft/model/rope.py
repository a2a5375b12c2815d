"""Rotary position angles (Su et al. 2021), and how they are stretched beyond the trained context.

Everything is rounded in the order in which transformers rounds: at long range another order turns by visibly other angles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lineshaft.model.config import ModelConfig
from lineshaft.model.positions import Dynamic, Linear, Llama3, RopeScaling, Yarn
from lineshaft.ops import table as ops


@dataclass(frozen=True)
class Rotation:
    """The angles of one batch: worked out once, used by every layer."""

    cos_TR: Tensor
    sin_TR: Tensor
    interleaved: bool = False

    def __call__(self, x_THD: Tensor) -> Tensor:
        """Rotate every head of every token by the angles of its position."""
        return ops.rope(x_THD, self.cos_TR, self.sin_TR, self.interleaved)


def rotation(config: ModelConfig, positions_T: Tensor) -> Rotation:
    """Cosine and sine of position * speed, in float32 [T, rotary_dim / 2], for int64 positions [T] of packed texts."""
    scaling = config.rope_scaling
    speed = _dynamic_speeds(config, scaling, positions_T) if isinstance(scaling, Dynamic) else speeds(config, positions_T.device)
    cos_TR, sin_TR = ops.angles(positions_T, speed, scaling.length if isinstance(scaling, Yarn) else 1.0)
    return Rotation(cos_TR, sin_TR)


def speeds(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position for each rotated pair, float32 [rotary_dim / 2]. Worked out once: do not write into it."""
    return _speeds(config.rope_theta, config.rotary_dim, config.rope_scaling, device)


@lru_cache(maxsize=16)
def _speeds(theta: float, width: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be made while serving and used while training
        turns_R = theta ** _steps(width, device)
        match scaling:
            case Linear(factor=factor):
                return 1.0 / turns_R / factor
            case Llama3():
                return _llama3_speeds(1.0 / turns_R, scaling)
            case Yarn():
                return _yarn_speeds(turns_R, theta, scaling)
        return 1.0 / turns_R


def _steps(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, width, 2, dtype=torch.float32, device=device) / width


def _dynamic_speeds(config: ModelConfig, scaling: Dynamic, positions_T: Tensor) -> Tensor:
    """[T, R]: the base grows with the length of the text that a token belongs to, once that exceeds the trained one.

    The engine never runs a text beyond max_position_embeddings, so there it turns as trained.
    """
    width, trained = config.rotary_dim, config.max_position_embeddings
    length_T = text_lengths(positions_T)
    stretch_T = torch.where(length_T > trained, (scaling.factor * length_T / trained) - (scaling.factor - 1), 1.0)
    base_T = config.rope_theta * stretch_T ** (width / (width - 2))
    return 1.0 / base_T[:, None] ** _steps(width, positions_T.device)


def text_lengths(positions_T: Tensor) -> Tensor:
    """For each token of a packed row the length of its text so far in this row: one more than its last position."""
    starts_T = torch.ones_like(positions_T, dtype=torch.bool)
    starts_T[1:] = positions_T[1:] != positions_T[:-1] + 1
    text_T = starts_T.cumsum(0) - 1
    ends = torch.cat([starts_T[1:], starts_T[:1]])  # a text ends where the next one starts; the row's end is an end
    return positions_T[ends][text_T] + 1


def _llama3_speeds(speed_R: Tensor, scaling: Llama3) -> Tensor:
    """Slow pairs divided by the factor, fast ones kept, between them a straight line in turns within the trained context."""
    trained, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength_R = 2 * math.pi / speed_R
    squeezed_R = torch.where(wavelength_R > trained / low, speed_R / scaling.factor, speed_R)
    share_R = (trained / wavelength_R - low) / (high - low)
    ramp_R = (1 - share_R) * squeezed_R / scaling.factor + share_R * squeezed_R
    between_R = (wavelength_R >= trained / high) & (wavelength_R <= trained / low)
    return torch.where(between_R, ramp_R, squeezed_R)


def _yarn_speeds(turns_R: Tensor, theta: float, scaling: Yarn) -> Tensor:
    """Equation 23 of the paper: a ramp over channels between those that turn often and those that turn seldom."""
    width, last = 2 * len(turns_R), 2 * len(turns_R) - 1

    def channel(rounds: float) -> float:
        """The channel pair that turns this often within the trained context (equation 17)."""
        return width * math.log(scaling.original_max_position_embeddings / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    first, end = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, end = math.floor(first), math.ceil(end)
    first, end = max(first, 0), min(end, last)
    ramp_R = (torch.arange(len(turns_R), dtype=torch.float32) - first) / (end - first if end != first else 0.001)
    kept_R = 1 - ramp_R.clamp(0, 1).to(turns_R.device)
    return 1.0 / (scaling.factor * turns_R) * (1 - kept_R) + 1.0 / turns_R * kept_R
