"""How the weight of a linear layer is stored, and how it is multiplied by.

A format encodes a dense weight into named tensors, decodes them back and multiplies by them. Names of the tensors in a
format are the names in the checkpoint: nothing is renamed or rearranged between disk and product. How a checkpoint says
which layer has which format is in `quantization.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.ops import table
from lineshaft.ops.fp8 import spread_blocks, unpack_fp8
from lineshaft.ops.integers import Integers, integers, pack

Tensors = Mapping[str, Tensor]
Activations: TypeAlias = Literal["int8", "int8-static"]

_SMALLEST_FP16 = 2.0**-24
_LARGEST_E4M3 = 448.0
_SUPPORTED = {
    (8, True, "pack-quantized"): (127.0, 127.5),
    (8, True, "int-quantized"): (127.0, 127.5),
    (4, True, "pack-quantized"): (7.5, 7.51),
    (4, False, "pack-quantized"): (15.0, 15.02),
}
"""(bits, symmetric, packing) of Integer to (steps that a scale is a part of, multiples of it that lose nothing but rounding).

Symmetric 4-bit codes go from -8 to 7: at 7.5 steps no weight is further than half a step from one, and steps are finer than at 7.
"""

_TOLD = {None: "", "int8": ", int8 activations", "int8-static": ", int8 activations by one scale"}


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
class Integer:
    """Integer weights with one scale a channel, or one a group of inputs, in a layout of compressed-tensors.

    `encode` rounds the scale to FP16 first, then w to the nearest multiple of it: the rounding uses the scale that the product
    will use. Scales of others may be BF16 or FP32. Groups of 32 take 8 + 16/32 = 8.5 or 4 + 16/32 = 4.5 bits a weight.
    Raises ConfigError for a combination that is not supported: 8 bits with zero points, 4 bits unpacked.
    """

    bits: Literal[8, 4]
    group: int | None = None
    symmetric: bool = True
    """Zero is the code in the middle; else each group stores its code of zero, packed along outputs (4 bits only)."""
    activations: Activations | None = None
    """Activations are rounded to 8 bits, by one scale a token or, `int8-static`, by one for all that calibration found (`input_scale`);
    None: they are not."""
    packing: Literal["pack-quantized", "int-quantized"] = "pack-quantized"
    """Codes in words of int32 (`weight_packed`), or a weight a byte as int8 (`weight`; 8 bits only)."""

    def __post_init__(self) -> None:
        if (self.bits, self.symmetric, self.packing) not in _SUPPORTED:
            told = f"{self.bits} bits, {'' if self.symmetric else 'a'}symmetric, {self.packing}"
            raise ConfigError(f"integers of {told} are not supported")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """See Format."""
        seen = ("input_scale",) if self.activations == "int8-static" else ()
        if self.packing == "int-quantized":
            return ("weight", "weight_scale", *seen)
        return ("weight_packed", "weight_scale", "weight_shape", *(() if self.symmetric else ("weight_zero_point",)), *seen)

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format. Raises ConfigError for `int8-static`: the weight does not tell what meets it (`encode_static`)."""
        if self.activations == "int8-static":
            raise ConfigError(f"{self.describe()}: the scale of activations comes from calibration: take the step `static`")
        return self._encode(weight_OI)

    def encode_static(self, weight_OI: Tensor, largest: float) -> dict[str, Tensor]:
        """The tensors of an `int8-static` format for a dense weight; codes of activations reach as far as `largest`, a magnitude.

        Raises ConfigError where that is no finite number; zero, where all activations were, gives a scale of 1.
        """
        if not 0 <= largest < math.inf:
            raise ConfigError(f"activations of up to {largest} have no scale")
        scale = max(largest / 127, torch.finfo(torch.float32).tiny) if largest else 1.0
        return self._encode(weight_OI) | {"input_scale": torch.tensor([scale])}

    def _encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight_OI.shape
        grouped_OGI = weight_OI.detach().float().reshape(outputs, self.groups(inputs), -1)
        scale_OG, zero_OG = self.scale_and_zero(grouped_OGI)
        return self.store(self.nearest(grouped_OGI, scale_OG[:, :, None], zero_OG[:, :, None]).flatten(1), scale_OG, zero_OG)

    def store(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> dict[str, Tensor]:
        """The tensors of this format for a weight of (code - zero) * scale, chosen by whatever method.

        codes_OI: uint8, below 2^bits. scale_OG and zero_OG: float16 and uint8, as `scale_and_zero` gives them; a symmetric format
        stores no zeros.
        """
        if self.packing == "int-quantized":
            return {"weight": (codes_OI ^ 128).view(torch.int8), "weight_scale": scale_OG}
        packed = {"weight_packed": pack(codes_OI, self.bits), "weight_scale": scale_OG, "weight_shape": torch.tensor(codes_OI.shape)}
        return packed if self.symmetric else packed | {"weight_zero_point": pack(zero_OG.T, self.bits).T.contiguous()}

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The code nearest to each float32 weight as uint8, ties to even, for scales and zeros of shapes that broadcast with it."""
        return (weight / scale.float()).round_().add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def scale_and_zero(self, grouped_OGI: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the code of zero of each group of inputs of a float32 weight, float16 and uint8 [O, G].

        Raises ConfigError where a scale would not be finite.
        """
        least_OG, largest_OG = grouped_OGI.amin(-1).clamp_(max=0), grouped_OGI.amax(-1).clamp_(min=0)
        span_OG = torch.maximum(-least_OG, largest_OG) if self.symmetric else largest_OG - least_OG
        steps, reach = _SUPPORTED[self.bits, self.symmetric, self.packing]
        scale_OG = (span_OG / steps).clamp(min=_SMALLEST_FP16).to(torch.float16)
        # Near zero FP16 has steps as coarse as its numbers: one that was rounded down would cut the largest weights off.
        scale_OG += _SMALLEST_FP16 * (scale_OG.float() * reach < span_OG)
        if not torch.isfinite(scale_OG).all():
            told = f"too large for INT{self.bits} with FP16 scales (its scale exceeds 65504)"
            raise ConfigError(f"a weight is not a number or {told}")
        if self.symmetric:
            return scale_OG, torch.full(scale_OG.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=scale_OG.device)
        return scale_OG, (-least_OG / scale_OG.float()).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        groups, a_word = self.groups(inputs), 32 // self.bits
        shapes = {
            "weight": ((outputs, inputs), torch.int8),
            "weight_packed": ((outputs, inputs // a_word), torch.int32),
            "weight_scale": ((outputs, groups), torch.float16),
            "weight_shape": ((2,), torch.int64),
            "weight_zero_point": ((-(-outputs // a_word), groups), torch.int32),
            "input_scale": ((1,), torch.float32),
        }
        return {name: torch.empty(shapes[name][0], dtype=shapes[name][1]) for name in self.tensor_names}

    def groups(self, inputs: int) -> int:
        """Groups of so many inputs. Raises ConfigError where they do not fit."""
        width, a_word = self.group or inputs, 1 if self.packing == "int-quantized" else 32 // self.bits
        if inputs % width or inputs % a_word:
            unit = width if inputs % width else a_word
            told = f"{inputs} inputs are not a multiple of {unit}; choose another group or leave this layer out"
            raise ConfigError(f"int{self.bits}: {told}")
        return inputs // width

    def integers(self, tensors: Tensors) -> Integers:
        """Codes, scales and zeros apart from any layout: weight = (code - zero) * scale."""
        return integers(*self._stored(tensors), self.bits)

    def _stored(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
        codes = tensors["weight_packed" if self.packing == "pack-quantized" else "weight"]
        return codes, tensors["weight_scale"], tensors.get("weight_zero_point")

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return self.integers(tensors).decode(dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format. With `activations` it differs from the product with the decoded weight by the rounding of x."""
        if self.activations is None:
            return table.linear_int(x_TI, *self._stored(tensors), self.bits, bias_O)
        return table.linear_int_a8(x_TI, *self._stored(tensors), self.bits, bias_O, self.input_scale(tensors))

    def input_scale(self, tensors: Tensors) -> float:
        """Of activations, the same for all tokens; 0 where each token has its own, or none.

        Raises BadCheckpoint where the one that is stored can't be a scale.
        """
        if self.activations != "int8-static":
            return 0.0
        scale = float(tensors["input_scale"])
        if not 0 < scale < math.inf:
            raise BadCheckpoint(f"input_scale {scale} is no scale: the checkpoint is damaged or was not calibrated")
        return scale

    def describe(self) -> str:
        """See Format."""
        scale = f"one scale{'' if self.symmetric else ' and zero point'} a {'channel' if self.group is None else f'group of {self.group}'}"
        return f"int{self.bits}, {scale}{_TOLD[self.activations]}"


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
        codes = weight / spread_blocks(scale_BC, weight.shape, self.block)
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
        return unpack_fp8(tensors["weight"], tensors["weight_scale_inv"], self.block, dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear_fp8(x_TI, tensors["weight"], tensors["weight_scale_inv"], self.block, bias_O)

    def describe(self) -> str:
        """See Format."""
        rows, columns = self.block
        return f"fp8, one {'power-of-two ' if self.power_of_two else ''}scale a block of {rows}x{columns}"


DENSE = Dense()
