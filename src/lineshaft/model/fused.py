"""Linear layers and what stands next to them as one op where their weights are packed; else one after another, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lineshaft.model.linear import Linear
from lineshaft.ops import neighbours
from lineshaft.ops import table as ops
from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.packed import Packed


def side_by_side(x_TI: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """What each layer makes of the same activations, [T, O] of each."""
    found = _neighbours(linears)
    return [linear(x_TI) for linear in linears] if found is None else ops.packed_linears(x_TI, found)


def swiglu(x_TI: Tensor, gate: Linear, up: Linear) -> Tensor:
    """SiLU(gate(x)) * up(x) (Shazeer 2020), [T, O]."""
    found = _neighbours((gate, up))
    return ops.silu_mul(gate(x_TI), up(x_TI)) if found is None else ops.packed_swiglu(x_TI, found)


def added(onto_TO: Tensor, linear: Linear, x_TI: Tensor) -> Tensor:
    """onto + linear(x), [T, O]."""
    fmt = linear.format
    if not isinstance(fmt, Packed) or fmt.wide:
        return ops.add(onto_TO, linear(x_TI))
    return ops.packed_linear(x_TI, linear.tensors()["packed"], fmt.shape, linear.bias, fmt.whole, False, fmt.input_scale, onto_TO)


def _neighbours(linears: Sequence[Linear]) -> Neighbours | None:
    """Their weights as one op takes them; None where they are not packed, or not alike."""
    formats = [linear.format for linear in linears if isinstance(linear.format, Packed)]
    if len(formats) < len(linears) or len({(fmt.whole, fmt.input_scale, fmt.wide) for fmt in formats}) > 1 or formats[0].wide:
        return None
    shapes = tuple(fmt.shape for fmt in formats)
    if not neighbours.alike(shapes):
        return None
    packed = tuple(linear.tensors()["packed"] for linear in linears)
    return Neighbours(packed, shapes, tuple(linear.bias for linear in linears), formats[0].whole, formats[0].input_scale)
