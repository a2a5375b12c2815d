"""How weights lie in memory for the native kernels, in PyTorch: the reference of native/src/packed.h.

Outputs in groups of 64; within a group, inputs in rows of 256 bytes: 64 outputs by 1 (float32), 2 (bf16), 4 (8 bits, FP8 too) or 8
(4 bits) neighbouring inputs. Before the rows of each group of inputs that shares a scale, codes carry 64 float32 scales
and, where zero points differ, 64 bytes of them.

Shape letters: O outputs, I inputs, G groups of inputs, N groups of outputs, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.pages import place
from lineshaft.ops.integers import Integers
from lineshaft.ops.isa import library

Kind = Literal["float32", "bfloat16", "int8", "int4", "float8"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4", "float8")
_INPUTS = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8, "float8": 4}
_MIDDLE = {"int8": 128, "int4": 8}
_GROUP, _ROW = 64, 256


@dataclass(frozen=True)
class Shape:
    """What a packed weight is."""

    kind: Kind
    inputs: int
    outputs: int
    scale_inputs: int = 0
    """Inputs that share a scale; 0 for dense weights."""
    zeros: bool = False
    """Zero points are stored; else they are 128 (int8) or 8 (int4); FP8 has none."""

    @property
    def fits(self) -> bool:
        """Can the kernels take it? Rows must be whole, and sums of 8-bit products within int32."""
        return not (self.scale_inputs or self.inputs) % max(4, _INPUTS[self.kind]) and self.inputs < 2**16

    @property
    def native(self) -> tuple[int, int, int, int, bool]:
        """As the library takes it."""
        return KINDS.index(self.kind), self.inputs, self.outputs, self.scale_inputs, self.zeros

    @property
    def scales(self) -> int:
        """Groups of inputs."""
        return self.inputs // self.scale_inputs if self.scale_inputs else 1

    @property
    def header(self) -> int:
        """Bytes of scales and zero points before the rows of a group of inputs."""
        return (4 * _GROUP + (_GROUP if self.zeros else 0)) if self.scale_inputs else 0


def pack_dense(weight_OI: Tensor) -> tuple[Shape, Tensor] | None:
    """A float32 or bf16 weight, packed: uint8. None for another dtype, or a shape that the kernels can't take."""
    found = pack_alike([weight_OI])
    return None if found is None else (found[0], found[1][0])


def pack_alike(weights: Sequence[Tensor]) -> tuple[Shape, Tensor] | None:
    """Weights of one shape, each packed like `pack_dense`, one after another: uint8 [N, bytes of one]."""
    shape, native = _shape_of(weights[0]), library()
    if shape is None:
        return None
    if native is None:
        return shape, torch.stack([_rows(weight.contiguous().view(torch.uint8), shape).flatten() for weight in weights])
    out = _memory(len(weights) * native.packed_bytes(*shape.native)).view(len(weights), -1)
    for weight_OI, own in zip((weight.contiguous() for weight in weights), out, strict=True):
        native.pack_dense(*shape.native[:3], weight_OI.data_ptr(), weight_OI.stride(0), own.data_ptr())
    return shape, out


def _shape_of(weight_OI: Tensor) -> Shape | None:
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        return None
    shape = Shape("float32" if weight_OI.dtype == torch.float32 else "bfloat16", weight_OI.shape[1], weight_OI.shape[0])
    return shape if shape.fits else None


def pack_coded(weight: Integers, bits: int) -> tuple[Shape, Tensor] | None:
    """Codes of 8 or 4 bits, packed: uint8. None for a shape that the kernels can't take."""
    codes_OI, scale_OG, zero_OG = weight.codes_OI, weight.scale_OG, weight.zero_OG
    kind: Kind = "int8" if bits == 8 else "int4"
    zeros = bool((zero_OG != _MIDDLE[kind]).any())
    shape = Shape(kind, codes_OI.shape[1], codes_OI.shape[0], codes_OI.shape[1] // scale_OG.shape[1], zeros)
    return (shape, _laid(codes_OI, scale_OG, zero_OG, shape)) if shape.fits else None


def pack_fp8(weight_OI: Tensor, scale_BC: Tensor, block: tuple[int, int]) -> tuple[Shape, Tensor] | None:
    """float8_e4m3fn weights with one scale a block of outputs x inputs, packed: uint8, a scale an output and block of inputs.

    None where the blocks along the inputs are not alike, or the kernels can't take the shape, or a weight is not a number: the
    kernels have no way to say that one.
    """
    outputs, inputs = weight_OI.shape
    codes_OI = weight_OI.view(torch.uint8)
    shape = Shape("float8", inputs, outputs, min(block[1], inputs))
    if not shape.fits or inputs % shape.scale_inputs or int((codes_OI & 127).max()) == 127:
        return None
    scale_OG = scale_BC.repeat_interleave(block[0], 0)[:outputs]
    return shape, _laid(codes_OI, scale_OG, torch.zeros(scale_OG.shape, dtype=torch.uint8), shape)


def _laid(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, shape: Shape) -> Tensor:
    """Codes of a byte each, scales and zeros in their places; zeros are left out where the shape says so."""
    native = library()
    if native is None:
        return _coded(codes_OI, scale_OG, zero_OG, shape)
    codes_OI, scale_OG, zero_OG = codes_OI.contiguous(), scale_OG.float().contiguous(), zero_OG.contiguous()
    out = _memory(native.packed_bytes(*shape.native))
    native.pack_coded(*shape.native, codes_OI.data_ptr(), scale_OG.data_ptr(), zero_OG.data_ptr(), out.data_ptr())
    return out


def unpack(packed: Tensor, shape: Shape) -> Tensor:
    """The weight [O, I] again: as it was when dense, else in float32."""
    wide, groups = _INPUTS[shape.kind], -(-shape.outputs // _GROUP)
    parts = packed.view(groups, shape.scales, -1)
    rows_NGRB = parts[..., shape.header :].reshape(groups, shape.scales, -1, _GROUP, _ROW // _GROUP)
    bytes_NOGRB = rows_NGRB.permute(0, 3, 1, 2, 4).contiguous()
    if not shape.scale_inputs:
        dtype = torch.float32 if shape.kind == "float32" else torch.bfloat16
        return bytes_NOGRB.view(groups * _GROUP, -1).view(dtype)[: shape.outputs].clone()
    if shape.kind == "int4":
        bytes_NOGRB = torch.cat([bytes_NOGRB & 15, bytes_NOGRB >> 4], -1)
    bytes_NOGK = bytes_NOGRB.reshape(groups, _GROUP, shape.scales, -1, wide).flatten(3)
    scale_NGO = parts[..., : 4 * _GROUP].contiguous().view(torch.float32)
    if shape.kind == "float8":
        weight = bytes_NOGK.view(torch.float8_e4m3fn).float() * scale_NGO.transpose(1, 2)[..., None]
        return weight.reshape(groups * _GROUP, -1)[: shape.outputs]
    codes_NOGK = bytes_NOGK.float()
    zero_NGO = parts[..., 4 * _GROUP : shape.header].float() if shape.zeros else torch.full_like(scale_NGO, _MIDDLE[shape.kind])
    weight = (codes_NOGK - zero_NGO.transpose(1, 2)[..., None]) * scale_NGO.transpose(1, 2)[..., None]
    return weight.reshape(groups * _GROUP, -1)[: shape.outputs]


def _rows(bytes_OJ: Tensor, shape: Shape) -> Tensor:
    """[N, G, bytes of the rows of a group of inputs] of the bytes of a weight."""
    padded = F.pad(bytes_OJ, (0, 0, 0, -len(bytes_OJ) % _GROUP))
    return padded.view(-1, _GROUP, shape.scales, bytes_OJ.shape[1] // shape.scales // 4, 4).permute(0, 2, 3, 1, 4).flatten(2)


def _coded(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, shape: Shape) -> Tensor:
    if shape.kind == "int4":
        halves = codes_OI.view(len(codes_OI), -1, 2, 4)
        codes_OI = (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)
    missing = -shape.outputs % _GROUP
    filled = (F.pad(item, (0, 0, 0, missing)) for item in (scale_OG.float(), zero_OG))
    scale_NGO, zero_NGO = (item.view(-1, _GROUP, shape.scales).transpose(1, 2).contiguous() for item in filled)
    return torch.cat([scale_NGO.view(torch.uint8), *([zero_NGO] if shape.zeros else []), _rows(codes_OI, shape)], -1).flatten()


def _memory(size: int) -> Tensor:
    found = place(size)
    return torch.frombuffer(found.memory, dtype=torch.uint8, count=size, offset=found.offset)
