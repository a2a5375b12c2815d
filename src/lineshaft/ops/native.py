"""The native kernels behind the op table: shapes and dtypes are checked here, addresses go to the library (native/src).

Every one of them gives a row the same bits in any company: sums run in an order that does not depend on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineshaft.ops import checks
from lineshaft.ops.isa import library
from lineshaft.ops.packing import Shape
from lineshaft.ops.reach import Blocks, Reach, Window


def packed_linear(x_TI: Tensor, packed: Tensor, shape: Shape, bias_O: Tensor | None, whole: bool) -> Tensor:
    """See `reference.packed_linear`."""
    kind, x_TI = checks.float_of(x_TI), _rows_of(x_TI)
    checks.linear(x_TI, packed, shape, bias_O, _library().packed_bytes(*shape.native), whole)
    out_TO = torch.empty(len(x_TI), shape.outputs, dtype=x_TI.dtype)
    bias = None if bias_O is None else bias_O.float().contiguous()
    _library().linear(
        *shape.native,
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        whole,
        kind,
        x_TI.data_ptr(),
        x_TI.stride(0),
        out_TO.data_ptr(),
        shape.outputs,
        len(x_TI),
    )
    return out_TO


def rms_norm(x: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    checks.norm(x, weight_I)
    kind, rows_TI, weight_I = checks.float_of(x), _rows_of(x.flatten(0, -2)), weight_I.contiguous()
    (tokens, width), out = rows_TI.shape, torch.empty(x.shape, dtype=x.dtype)
    weight = checks.float_of(weight_I), weight_I.data_ptr()
    _library().norm(kind, rows_TI.data_ptr(), rows_TI.stride(0), *weight, eps, out.data_ptr(), width, tokens, width)
    return out


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """See `reference.rope`."""
    checks.rope(x_THD, cos_TR, sin_TR)
    kind, x_THD, cos_TR, sin_TR = checks.float_of(x_THD), _rows_of(x_THD), cos_TR.contiguous(), sin_TR.contiguous()
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    _library().rope(
        kind, x_THD.data_ptr(), *x_THD.stride()[:2], cos_TR.data_ptr(), sin_TR.data_ptr(), interleaved, out.data_ptr(), *x_THD.shape
    )
    return out


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    checks.alike("silu_mul", gate_TI, up_TI)
    gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    out = torch.empty(gate_TI.shape, dtype=gate_TI.dtype)
    _library().silu_mul(checks.float_of(gate_TI), gate_TI.data_ptr(), up_TI.data_ptr(), out.data_ptr(), out.numel())
    return out


def paged_attention(
    q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, chunks_C4: Tensor, tables: Tensor, scale: float, reach: Reach
) -> Tensor:
    """See `reference.paged_attention`."""
    kind = checks.float_of(q_THD)
    checks.attention(q_THD, pages_k, pages_v, chunks_C4, tables)
    q_THD, chunks_C4, tables = q_THD.contiguous(), chunks_C4.contiguous(), tables.contiguous()
    heads, width = q_THD.shape[1:]
    kv_heads, values = pages_v.shape[-2:]
    out_THV = torch.empty(len(q_THD), heads, values, dtype=q_THD.dtype)
    _library().attention(
        kind,
        q_THD.data_ptr(),
        q_THD.stride(0),
        pages_k.data_ptr(),
        pages_k.stride(1),
        pages_k.stride(2),
        pages_v.data_ptr(),
        pages_v.stride(1),
        pages_v.stride(2),
        pages_k.shape[1],
        chunks_C4.data_ptr(),
        len(chunks_C4),
        tables.data_ptr(),
        *_numbers(reach),
        scale,
        heads,
        kv_heads,
        width,
        values,
        out_THV.data_ptr(),
    )
    return out_THV


def _numbers(reach: Reach) -> tuple[int, int, int, int]:
    """Kind and numbers, as native/src/kernels.h has them."""
    if isinstance(reach, Window):
        return 1, reach.window, reach.global_tokens, 0
    if isinstance(reach, Blocks):
        return 2, reach.block, reach.local_blocks, reach.stride
    return 0, 0, 0, 0


def _library() -> Any:
    found = library()
    assert found is not None  # the table holds these kernels only where it is there
    return found


def _rows_of(x: Tensor) -> Tensor:
    """With the channels of a row side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
