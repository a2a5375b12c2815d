"""How the weight of a linear layer is stored, and how it is multiplied by.

A format encodes a dense weight into named tensors, decodes them back and multiplies by them. Names of the tensors in a
format are the names in the checkpoint: nothing is renamed or rearranged between disk and product. How a checkpoint says
which layer has which format is in `quantization.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.ops import reference, table

Tensors = Mapping[str, Tensor]

_SMALLEST_FP16 = 2.0**-24
_LARGEST_E4M3 = 448.0


class Format(Protocol):
    """One way to store the weight of a linear layer."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold one weight."""

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors of this format for a dense weight. Raises ConfigError when its shape does not fit."""

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes for a weight [outputs, inputs], on the default device, to be loaded into."""

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The dense weight [O, I] that a product with these tensors multiplies by."""

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """x W^T + b as [T, O]."""

    def describe(self) -> str:
        """For people, such as `int8, one scale a channel`."""


@dataclass(frozen=True)
class Dense:
    """The weight as it is, in the dtype it has."""

    tensor_names: tuple[str, ...] = ("weight",)

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        return {"weight": weight_OI}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return {"weight": torch.empty(outputs, inputs)}

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return tensors["weight"].to(dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear(x_TI, tensors["weight"], bias_O)

    def describe(self) -> str:
        """See Format."""
        return "dense"


@dataclass(frozen=True)
class Int8:
    """Symmetric INT8 weights, activations untouched; one FP16 scale a channel, or one a group of inputs.

    scale = max|w| / 127 over the group, rounded to FP16 first, then w is rounded to the nearest multiple of it: the
    rounding uses the scale that the product will use. With groups of 32 a weight takes 8 + 16/32 = 8.5 bits.
    """

    group: int | None = None
    tensor_names: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        outputs, inputs = weight_OI.shape
        groups = self._groups(inputs)
        grouped_OGI = weight_OI.detach().float().reshape(outputs, groups, -1)
        limit_OG = grouped_OGI.abs().amax(-1)
        scale_OG = (limit_OG / 127).clamp(min=_SMALLEST_FP16).to(torch.float16)
        # Near zero FP16 has steps as coarse as its numbers: one that was rounded down would cut the largest weights off.
        scale_OG += _SMALLEST_FP16 * (scale_OG.float() * 127.5 < limit_OG)
        if not torch.isfinite(scale_OG).all():
            raise ConfigError("a weight is not a number or too large for INT8 with FP16 scales (its scale exceeds 65504)")
        codes = (grouped_OGI / scale_OG.float()[:, :, None]).round().clamp(-128, 127).flatten(1)
        packed = (codes.to(torch.int16) + 128).to(torch.uint8).contiguous().view(torch.int32)
        return {"weight_packed": packed, "weight_scale": scale_OG, "weight_shape": torch.tensor([outputs, inputs])}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return {
            "weight_packed": torch.empty(outputs, inputs // 4, dtype=torch.int32),
            "weight_scale": torch.empty(outputs, self._groups(inputs), dtype=torch.float16),
            "weight_shape": torch.empty(2, dtype=torch.int64),
        }

    def _groups(self, inputs: int) -> int:
        width = self.group or inputs
        if inputs % width or inputs % 4:
            unit = width if inputs % width else 4
            raise ConfigError(f"int8: {inputs} inputs are not a multiple of {unit}; choose another group or leave this layer out")
        return inputs // width

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return reference.unpack_int8(tensors["weight_packed"], tensors["weight_scale"], dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear_int8(x_TI, tensors["weight_packed"], tensors["weight_scale"], bias_O)

    def describe(self) -> str:
        """See Format."""
        return f"int8, one scale a {'channel' if self.group is None else f'group of {self.group}'}"


@dataclass(frozen=True)
class Fp8Block:
    """FP8 weights (e4m3) with one scale a block of outputs x inputs, as DeepSeek-V3 ships them; activations untouched.

    weight: float8_e4m3fn [O, I]; weight_scale_inv: float32 [O / rows, I / columns] rounded up, blocks at the edges being
    smaller. The weight is code * scale, whatever the name says. DeepSeek's own kernels round activations to FP8 as well
    (arXiv 2412.19437, section 3.3); ours do not, so results are those of the decoded weights.
    """

    block: tuple[int, int] = (128, 128)
    """Outputs and inputs that share a scale."""
    power_of_two: bool = False
    """Scales are powers of two held as float32 ("scale_fmt": "ue8m0", DeepSeek-V3.1)."""
    tensor_names: tuple[str, ...] = ("weight", "weight_scale_inv")

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format. The scale is max|w| / 448 over the block, 1 where all is zero."""
        weight = weight_OI.detach().float()
        scale_BC = self._largest(weight) / _LARGEST_E4M3
        if not torch.isfinite(scale_BC).all():
            raise ConfigError("a weight is not a number or infinite, which FP8 can't hold")
        # Below its normal numbers float32 has steps as coarse as they are: codes would leave their range.
        scale_BC = scale_BC.clamp(min=torch.finfo(torch.float32).tiny).masked_fill(scale_BC == 0, 1)
        if self.power_of_two:
            mantissa, exponent = torch.frexp(scale_BC)
            scale_BC = torch.ldexp(torch.ones_like(scale_BC), exponent - (mantissa == 0.5).int())
        codes = weight / reference.spread_blocks(scale_BC, weight.shape, self.block)
        return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scale_BC}

    def _largest(self, weight_OI: Tensor) -> Tensor:
        """The largest magnitude in each block."""
        (rows, columns), (outputs, inputs) = self.block, weight_OI.shape
        padded = F.pad(weight_OI.abs(), (0, -inputs % columns, 0, -outputs % rows))
        return padded.view(-(-outputs // rows), rows, -(-inputs // columns), columns).amax((1, 3))

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        rows, columns = self.block
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn),
            "weight_scale_inv": torch.empty(-(-outputs // rows), -(-inputs // columns)),
        }

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return reference.unpack_fp8(tensors["weight"], tensors["weight_scale_inv"], self.block, dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear_fp8(x_TI, tensors["weight"], tensors["weight_scale_inv"], self.block, bias_O)

    def describe(self) -> str:
        """See Format."""
        rows, columns = self.block
        return f"fp8, one {'power-of-two ' if self.power_of_two else ''}scale a block of {rows}x{columns}"


DENSE = Dense()
