"""The native kernels of products by packed weights; as ops/native.py, which has the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineshaft.ops import checks
from lineshaft.ops.native import rows_of
from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.packing import Shape
from lineshaft.ops.recording import native_library, result


def packed_linear(
    x_TI: Tensor,
    packed: Tensor,
    shape: Shape,
    bias_O: Tensor | None,
    whole: bool,
    wide: bool = False,
    input_scale: float = 0.0,
    added_TO: Tensor | None = None,
) -> Tensor:
    """See `reference_packed.packed_linear`."""
    kind, x_TI = checks.float_of(x_TI), rows_of(x_TI)
    checks.linear(x_TI, packed, shape, bias_O, native_library().packed_bytes(*shape.native), whole, input_scale)
    out_TO = result((len(x_TI), shape.outputs), torch.float32 if wide else x_TI.dtype)
    bias_O = _bias(bias_O)
    if added_TO is not None:
        checks.alike("packed_linear", added_TO, out_TO)
        added_TO = rows_of(added_TO)
    native_library().linear(
        *shape.native,
        packed.data_ptr(),
        _address(bias_O),
        whole,
        kind,
        x_TI.data_ptr(),
        x_TI.stride(0),
        out_TO.data_ptr(),
        shape.outputs,
        len(x_TI),
        wide,
        input_scale,
        _address(added_TO),
        0 if added_TO is None else added_TO.stride(0),
    )
    return out_TO


def packed_linears(x_TI: Tensor, weights: Neighbours) -> tuple[Tensor, ...]:
    """See `reference_packed.packed_linears`."""
    x_TI, biases = _neighbours(x_TI, weights)
    outs = tuple(result((len(x_TI), shape.outputs), x_TI.dtype) for shape in weights.shapes)
    native_library().linears(
        *_form(weights.shapes[0]),
        [shape.outputs for shape in weights.shapes],
        *_operands(x_TI, weights, biases),
        [out_TO.data_ptr() for out_TO in outs],
        len(x_TI),
        weights.input_scale,
    )
    return outs


def packed_swiglu(x_TI: Tensor, gate_and_up: Neighbours) -> Tensor:
    """See `reference_packed.packed_swiglu`."""
    if len(gate_and_up.shapes) != 2 or gate_and_up.shapes[0] != gate_and_up.shapes[1]:
        raise ValueError(f"packed_swiglu: two weights of one shape are wanted, not {gate_and_up.shapes}")
    x_TI, biases = _neighbours(x_TI, gate_and_up)
    shape = gate_and_up.shapes[0]
    out_TO = result((len(x_TI), shape.outputs), x_TI.dtype)
    native_library().swiglu(
        *_form(shape),
        shape.outputs,
        *_operands(x_TI, gate_and_up, biases),
        out_TO.data_ptr(),
        len(x_TI),
        gate_and_up.input_scale,
    )
    return out_TO


def _neighbours(x_TI: Tensor, weights: Neighbours) -> tuple[Tensor, list[Tensor | None]]:
    """Activations and biases as the kernels take them, when all of them were looked at."""
    checks.float_of(x_TI)
    checks.neighbours(weights.shapes)
    for packed, shape, bias_O in zip(weights.packed, weights.shapes, weights.biases, strict=True):
        checks.linear(x_TI, packed, shape, bias_O, native_library().packed_bytes(*shape.native), weights.whole, weights.input_scale)
    return rows_of(x_TI), [_bias(bias_O) for bias_O in weights.biases]


def _operands(x_TI: Tensor, weights: Neighbours, biases: list[Tensor | None]) -> tuple[Any, ...]:
    """What meets, as the library takes it; the caller holds the biases, which may be new, until it has been called."""
    addresses = [packed.data_ptr() for packed in weights.packed], [_address(bias_O) for bias_O in biases]
    return *addresses, weights.whole, checks.float_of(x_TI), x_TI.data_ptr(), x_TI.stride(0)


def _form(shape: Shape) -> tuple[int, int, int, bool]:
    """A shape as the library takes it, without its outputs."""
    kind, inputs, _, scale_inputs, zeros = shape.native
    return kind, inputs, scale_inputs, zeros


def _bias(bias_O: Tensor | None) -> Tensor | None:
    return None if bias_O is None else bias_O.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    """0 stands for none."""
    return 0 if tensor is None else tensor.data_ptr()
