"""Weights and activations as integers: one neutral view of every integer layout on disk, for decoding and for kernels.

Shape letters as in reference.py; J words of a row, X words of a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Integers:
    """A weight as unsigned codes: weight = (code - zero) * scale, with G groups of equally many inputs."""

    codes_OI: Tensor
    """uint8 [O, I]; 4-bit codes are below 16."""
    scale_OG: Tensor
    """float32 [O, G]."""
    zero_OG: Tensor
    """uint8 [O, G]: the code of zero, 128 or 8 where weights are symmetric."""

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I]: worked out in float32, then `dtype`."""
        weight_OGI = self.codes_OI.to(torch.float32).view(*self.scale_OG.shape, -1)
        return weight_OGI.sub_(self.zero_OG[:, :, None]).mul_(self.scale_OG[:, :, None]).flatten(1).to(dtype)


def integers(codes: Tensor, scale_OG: Tensor, zero_XG: Tensor | None, bits: int) -> Integers:
    """The neutral view of a weight as compressed-tensors stores it.

    codes: int32 [O, I * bits / 32] (`pack-quantized`: see `pack`) or int8 [O, I] (`int-quantized`: code - 128).
    scale_OG: any float. zero_XG: int32 [O * bits / 32 rounded up, G], packed along outputs; None where weights are symmetric.
    """
    codes_OI = codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else unpack(codes, bits)
    if zero_XG is None:
        zero_OG = torch.full(scale_OG.shape, 1 << (bits - 1), dtype=torch.uint8, device=scale_OG.device)
    else:
        zero_OG = unpack(zero_XG.T, bits)[:, : len(scale_OG)].T.contiguous()
    return Integers(codes_OI, scale_OG.to(torch.float32), zero_OG)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """uint8 codes as int32 words [O, I * bits / 32 rounded up], lowest bits first, the last word filled up with zero bits."""
    if missing := -codes_OI.shape[1] % (32 // bits):  # pad copies even where nothing is missing, and that left holes in the heap
        codes_OI = F.pad(codes_OI, (0, missing))
    if bits == 4:
        codes_OI = codes_OI[:, ::2] | codes_OI[:, 1::2] << 4
    return codes_OI.flatten().view(torch.int32).view(len(codes_OI), -1)  # flat: a single row or column may have any stride


def unpack(words_OJ: Tensor, bits: int) -> Tensor:
    """The uint8 codes in int32 words, those that fill up the last word included. 8-bit codes are the same memory."""
    bytes_OI = words_OJ.flatten().view(torch.uint8).view(len(words_OJ), -1)
    return bytes_OI if bits == 8 else torch.stack((bytes_OI & 15, bytes_OI >> 4), -1).flatten(1)


def rounded(x_TI: Tensor, input_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Activations as 8-bit integers: (whole numbers, scale_T1), both float32; x / scale is rounded to nearest, ties to even.

    Without `input_scale` a token has a scale of its own, max|x| / 127, and 1 where that is zero: numbers go from -127 to 127. With it
    all tokens have this one, and numbers beyond -128 or 127 are cut off, as compressed-tensors has it.
    A token that holds something that is not a number, or infinite, gives numbers that are not.
    """
    x_TI = x_TI.to(torch.float32)
    largest_T1 = x_TI.abs().amax(-1, keepdim=True)
    if input_scale:
        scale_T1 = torch.full_like(largest_T1, input_scale).masked_fill_(~largest_T1.isfinite(), torch.nan)
        return (x_TI / scale_T1).round_().clamp_(-128, 127), scale_T1
    scale_T1 = largest_T1 / 127
    scale_T1.masked_fill_(scale_T1 == 0, 1)
    return (x_TI / scale_T1).round_().clamp_(-127, 127), scale_T1
