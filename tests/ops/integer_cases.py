"""Every kind of integer weight, and their products by other means: Python's own bits and numpy's rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.ops.formats import Integer
from lineshaft.ops.quantization import to_quantization_config

KINDS = [
    Integer(8),
    Integer(8, packing="int-quantized"),
    Integer(4),
    Integer(4, symmetric=False),
]
GROUPS = [None, 8, 32, 64]


@st.composite
def integers(draw: st.DrawFn, activations: str | None = None) -> Integer:
    """One of them, by channels or by groups."""
    kind, group = draw(st.sampled_from(KINDS)), draw(st.sampled_from(GROUPS))
    return Integer(kind.bits, group, kind.symmetric, activations, kind.packing)


def scheme_of(fmt: Integer) -> QuantizationScheme:
    """As compressed-tensors reads what we write."""
    config = to_quantization_config({"a": fmt})
    assert config is not None
    return QuantizationScheme(**config["config_groups"]["group_0"])


def compressor_of(fmt: Integer) -> Any:
    return BaseCompressor.get_value_from_registry(fmt.packing)


def codes_of(words: Tensor, bits: int) -> list[list[int]]:
    """The numbers of `bits` bits in each row of int32 words, lowest first."""
    return [[(word >> shift) % 2**bits for word in row for shift in range(0, 32, bits)] for row in words.tolist()]


def exact_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """int64 [O, I]: codes less their zeros."""
    if codes.dtype == torch.int8:
        return codes.long()
    zeros = torch.full(scale.shape, 2 ** (bits - 1)) if zero is None else torch.tensor(codes_of(zero.T, bits)).T[: len(scale)]
    unsigned = torch.tensor(codes_of(codes, bits))
    return unsigned - zeros.repeat_interleave(unsigned.shape[1] // scale.shape[1], 1)


def exact_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """float64 [O, I]."""
    exact = exact_codes(codes, scale, zero, bits)
    return exact.double() * scale.double().repeat_interleave(exact.shape[1] // scale.shape[1], 1)


def exact_linear_int(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None) -> Tensor:
    return torch.einsum("ti,oi->to", x, exact_weight(codes, scale, zero, bits)) + (0 if bias is None else bias)


def exact_linear_int_a8(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None, input_scale: float
) -> Tensor:
    """Rounded by float32's numbers, then summed as whole numbers."""
    q, step = rounded_to_bytes(x, input_scale)
    q_TGI, codes_OGI = (each.unflatten(1, (scale.shape[1], -1)) for each in (q, exact_codes(codes, scale, zero, bits)))
    dots = torch.einsum("tgi,ogi->tog", q_TGI, codes_OGI)
    return (dots.double() * scale.double()).sum(-1) * step + (0 if bias is None else bias)


def rounded_to_bytes(x: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """Whole numbers and their scale, one a token or, unless it is zero, `input_scale`, in float64."""
    single = x.numpy().astype(np.float32)
    if input_scale:
        step = np.full((len(single), 1), input_scale, np.float32)
        return torch.from_numpy(np.clip(np.rint(single / step), -128, 127)).long(), torch.from_numpy(step).double()
    step = np.abs(single).max(1, keepdims=True) / np.float32(127)
    step = np.where(step == 0, np.float32(1), step)
    return torch.from_numpy(np.clip(np.rint(single / step), -127, 127)).long(), torch.from_numpy(step).double()
