"""FP8 weights with one scale a block of outputs and inputs, decoded.

Shape letters: O outputs, I inputs, B and C blocks of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_fp8(weight_OI: Tensor, scale_BC: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights that `linear_fp8` multiplies by: code * scale in float32, then `dtype`."""
    return weight_OI.float().mul_(spread_blocks(scale_BC.float(), weight_OI.shape, block)).to(dtype)


def spread_blocks(scale_BC: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """One number a block as one number an element of `shape`, the blocks at the edges cut."""
    return scale_BC.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
