"""Entries of cache pages in 8 bits (ops/entries.py says how they lie): what native/src/coded.h does, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.ops.entries import SCALED, entry_bytes, scales_at


def encode(x: Tensor) -> Tensor:
    """Entries [..., bytes] of the last dimension's channels, each rounded to the nearest code, ties to even.

    A scale is the largest |x| of its group / 127, as the next bf16 that is not smaller, so no code is beyond 127. A group of
    zeros has the scale 0; one with something that is not a number, or infinite, has a scale that is none.
    """
    width = x.shape[-1]
    x_GS = F.pad(x.float(), (0, -width % SCALED)).reshape(*x.shape[:-1], -(-width // SCALED), SCALED)
    exact_G = x_GS.abs().amax(-1) / 127
    scale_G = ((exact_G.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    scale_G = scale_G.masked_fill(~x_GS.isfinite().all(-1), torch.nan)
    used = scale_G > 0
    codes_GS = (x_GS / scale_G.float().where(used, 1.0)[..., None]).round_().where(used[..., None], 0)
    codes = F.pad(codes_GS.flatten(-2)[..., :width], (0, width % 2)).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scale_G.contiguous().view(torch.uint8)], -1)


def decode(entries: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The channels [..., width] of coded entries: code * scale in float32, where it is exact, rounded to `dtype` once."""
    if entries.dtype != torch.uint8 or entries.shape[-1] != entry_bytes(width):
        raise ValueError(f"entries of {width} channels take {entry_bytes(width)} bytes, these are {list(entries.shape)} {entries.dtype}")
    codes, scale_G = entries[..., :width].view(torch.int8), entries[..., scales_at(width) :].contiguous().view(torch.bfloat16)
    return (codes.float() * scale_G.float().repeat_interleave(SCALED, -1)[..., :width]).to(dtype)
