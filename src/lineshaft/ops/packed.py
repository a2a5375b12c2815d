"""A weight laid out for the native kernels: a format of memory, never of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lineshaft.ops import packing, table
from lineshaft.ops.formats import Dense, Format, Fp8Block, Integer
from lineshaft.ops.packing import Shape


@dataclass(frozen=True)
class Packed:
    """See ops/packing.py. Made from a layer's own format by `packed_of`."""

    origin: Format
    """What the checkpoint has."""
    shape: Shape
    whole: bool = False
    """Activations are rounded to 8 bits, as the origin means it."""
    input_scale: float = 0.0
    """Of those, the same for all tokens; 0: each has its own."""
    wide: bool = False
    """Results are float32, whatever activations are: for logits, where bf16 would leave ties between the best tokens."""
    tensor_names: tuple[str, ...] = ("packed",)

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        plain = replace(self.origin, activations=None) if isinstance(self.origin, Integer) else self.origin  # it is laid out alike
        made = packed_of(plain, plain.encode(weight_OI))
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
        return table.packed_linear(x_TI, tensors["packed"], self.shape, bias_O, self.whole, self.wide, self.input_scale)

    def describe(self) -> str:
        """See Format."""
        return f"{self.origin.describe()}, packed"


@dataclass(frozen=True)
class PackedHeads:
    """The up-projection of latent attention, [H * (N + V), C]: for each head its key half, turned round, and its value half.

    Both are dense, whatever the origin: scales along the latent would stand across the key half once it is turned.
    """

    origin: Format
    """What the checkpoint has."""
    keys: Shape
    """[C, N] of each head."""
    values: Shape
    """[V, C] of each head."""
    tensor_names: tuple[str, ...] = ("packed_keys", "packed_values")

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        kept = self.origin.decode(self.origin.encode(weight_OI), torch.float32 if self.keys.kind == "float32" else torch.bfloat16)
        made = packed_heads_of(self.origin, kept, len(weight_OI) // (self.keys.inputs + self.values.outputs), self.keys.inputs)
        assert made is not None
        return made[1]

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return self.encode(torch.zeros(outputs, inputs))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See Format."""
        parts: list[Tensor] = []
        for key, value in zip(tensors["packed_keys"], tensors["packed_values"], strict=True):
            parts += [packing.unpack(key, self.keys).T, packing.unpack(value, self.values)]
        return torch.cat(parts).to(dtype)

    def matmul(self, x_TI: Tensor, tensors: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        """See Format. Serving never multiplies by the whole of it (model/attend.LatentQuery)."""
        return table.linear(x_TI, self.decode(tensors, x_TI.dtype), bias_O)

    def describe(self) -> str:
        """See Format."""
        return f"{self.origin.describe()}, packed by head"


def packed_heads_of(fmt: Format, weight_OI: Tensor, heads: int, nope: int) -> tuple[PackedHeads, dict[str, Tensor]] | None:
    """The packed form of an up-projection for `heads` heads of `nope` key channels; None where the kernels can't take it."""
    weight_HWC = weight_OI.detach().view(heads, -1, weight_OI.shape[1])
    keys = packing.pack_alike([weight_WC[:nope].T for weight_WC in weight_HWC])
    values = packing.pack_alike([weight_WC[nope:] for weight_WC in weight_HWC])
    if keys is None or values is None:
        return None
    return PackedHeads(fmt, keys[0], values[0]), {"packed_keys": keys[1], "packed_values": values[1]}


def packed_of(fmt: Format, tensors: Mapping[str, Tensor], wide: bool = False) -> tuple[Packed, Tensor] | None:
    """The packed form of a weight, `wide` as in Packed; None where the kernels can't take it."""
    whole, input_scale = False, 0.0
    if isinstance(fmt, Dense):
        made = packing.pack_dense(tensors["weight"].detach())
    elif isinstance(fmt, Fp8Block):
        made = packing.pack_fp8(tensors["weight"], tensors["weight_scale_inv"], fmt.block)
    elif isinstance(fmt, Integer):
        made = packing.pack_coded(fmt.integers(tensors), fmt.bits)
        whole, input_scale = fmt.activations is not None, fmt.input_scale(tensors)
    else:
        return None
    return None if made is None else (Packed(fmt, made[0], whole, input_scale, wide), made[1])
