"""Rows of weights as GGUF stores them: dense numbers, or blocks of 32 codes with a scale, made of the codes that a checkpoint has.

Nothing is rounded a second time, but for the offset of a Q4_1 block. The layouts are those of ggml (ggml-common.h):

    kind   bytes of a block                       weight           made of
    Q8_0   FP16 d, 32 signed codes                d q              INT8
    Q4_0   FP16 d, 32 codes in 16 bytes           d (q - 8)        INT4, symmetric
    Q4_1   FP16 d, FP16 m, 32 codes in 16 bytes   d q + m          INT4 with zero points: m = -d zero, rounded to FP16

In 16 bytes the low halves hold codes 0 to 15 of a block, the high halves codes 16 to 31. A group of 64 or 128 inputs, or a whole
channel, becomes several blocks with one scale.

Letters: O outputs, I inputs, G groups, B blocks of a row, Y bytes of a row; I, G and B are of one row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Dense, Integer

Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]

BLOCK = 32
"""Weights that share a scale."""
BYTES: dict[Kind, tuple[int, int]] = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
"""Kind to (weights, bytes) of a block."""
_DENSE: dict[torch.dtype, Kind] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def kind_of(name: str, linear: Linear) -> Kind:
    """How a layer's weight is stored. Raises ConfigError, naming the layer, for a format that no kind can say."""
    fmt = linear.format
    if isinstance(fmt, Dense):
        return kind_of_dense(linear.weight)
    if not isinstance(fmt, Integer):
        told = "has no counterpart in GGUF: export the checkpoint that it was made from, or one in INT8"
        raise ConfigError(f"export: {name}: {fmt.describe()} {told}")
    if linear.in_features % BLOCK or (fmt.group or BLOCK) % BLOCK:
        told = f"{linear.in_features} inputs, {fmt.describe()}, are not whole blocks of {BLOCK} with one scale"
        raise ConfigError(f"export: {name}: {told}: compress with a group of {BLOCK} or a multiple, or leave this layer out")
    return "Q8_0" if fmt.bits == 8 else "Q4_0" if fmt.symmetric else "Q4_1"


def kind_of_dense(tensor: Tensor) -> Kind:
    """How dense numbers are stored: in the dtype that they have."""
    return _DENSE[tensor.dtype]


def row_bytes(kind: Kind, inputs: int) -> int:
    """Bytes of a row of so many weights."""
    weights, size = BYTES[kind]
    return inputs // weights * size


def dense_rows(tensor: Tensor) -> Tensor:
    """Dense numbers [..., I] as uint8 [..., Y]."""
    return tensor.detach().contiguous().view(torch.uint8)


def coded_rows(name: str, linear: Linear) -> Tensor:
    """The weight of an Integer layer as blocks, uint8 [O, Y]. Raises ConfigError where a scale has no FP16 value."""
    assert isinstance(linear.format, Integer)  # kind_of said so
    found, bits = linear.format.integers(linear.tensors()), linear.format.bits
    scale_OG = _half(name, "a scale", found.scale_OG)
    outputs, blocks = len(scale_OG), linear.in_features // BLOCK
    codes_OBI = found.codes_OI.view(outputs, blocks, BLOCK)
    parts = [_spread(scale_OG, blocks)]
    if bits == 8:
        return torch.cat([*parts, codes_OBI ^ 128], -1).flatten(1)
    if not linear.format.symmetric:
        offset_OG = _half(name, "an offset", -found.zero_OG.float() * found.scale_OG, exact=False)
        parts.append(_spread(offset_OG, blocks))
    low, high = codes_OBI[..., : BLOCK // 2], codes_OBI[..., BLOCK // 2 :]
    return torch.cat([*parts, low | high << 4], -1).flatten(1)


def _half(name: str, what: str, value_OG: Tensor, *, exact: bool = True) -> Tensor:
    half_OG = value_OG.to(torch.float16)
    if not torch.isfinite(half_OG).all() or (exact and not torch.equal(half_OG.float(), value_OG)):
        raise ConfigError(f"export: {name}: {what} has no FP16 value, which is what GGUF stores: compress with lineshaft's own FP16 scales")
    return half_OG


def _spread(value_OG: Tensor, blocks: int) -> Tensor:
    """FP16 numbers of groups as the bytes of each of their blocks, uint8 [O, B, 2]."""
    value_OB = value_OG.repeat_interleave(blocks // value_OG.shape[1], 1)
    return value_OB[..., None].contiguous().view(torch.uint8)
