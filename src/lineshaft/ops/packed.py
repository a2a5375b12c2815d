"""A weight laid out for the native kernels: a format of memory, never of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.ops import packing, table
from lineshaft.ops.formats import Dense, Format, Integer
from lineshaft.ops.packing import Shape


@dataclass(frozen=True)
class Packed:
    """See ops/packing.py. Made from a layer's own format by `packed_of`."""

    origin: Format
    """What the checkpoint has."""
    shape: Shape
    whole: bool = False
    """Activations are rounded to 8 bits, as the origin means it."""
    tensor_names: tuple[str, ...] = ("packed",)

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        made = packed_of(self.origin, self.origin.encode(weight_OI))
        assert made is not None
        return {"packed": made[1]}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return self.encode(torch.zeros(outputs, inputs))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See Format."""
        return packing.unpack(tensors["packed"], self.shape).to(dtype)

    def matmul(self, x_TI: Tensor, tensors: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.packed_linear(x_TI, tensors["packed"], self.shape, bias_O, self.whole)

    def describe(self) -> str:
        """See Format."""
        return f"{self.origin.describe()}, packed"


def packed_of(fmt: Format, tensors: Mapping[str, Tensor]) -> tuple[Packed, Tensor] | None:
    """The packed form of a weight; None where the kernels can't take it."""
    if isinstance(fmt, Dense):
        made = packing.pack_dense(tensors["weight"].detach())
    elif isinstance(fmt, Integer):
        made = packing.pack_coded(fmt.integers(tensors), fmt.bits)
    else:
        return None
    return None if made is None else (Packed(fmt, made[0], isinstance(fmt, Integer) and fmt.activations is not None), made[1])
