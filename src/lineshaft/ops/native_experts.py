"""The native kernels of latent attention's products by head, of routers and of experts; as ops/native.py, which has the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.ops.checks import float_of
from lineshaft.ops.experts import Feeds, Rule
from lineshaft.ops.native import rows_of
from lineshaft.ops.packing import Shape
from lineshaft.ops.recording import native_library, result


def sigmoid(x_TI: Tensor) -> Tensor:
    """See `reference.sigmoid`."""
    x_TI = x_TI.contiguous()
    out_TI = result(x_TI.shape, x_TI.dtype)
    native_library().sigmoid(float_of(x_TI), x_TI.data_ptr(), out_TI.data_ptr(), len(x_TI), x_TI.shape[1])
    return out_TI


def scaled(x_TI: Tensor, factor_T1: Tensor) -> Tensor:
    """See `reference.scaled`."""
    x_TI, factor_T1 = x_TI.contiguous(), factor_T1.contiguous()
    if factor_T1.shape != (len(x_TI), 1) or factor_T1.dtype != x_TI.dtype:
        raise ValueError(f"scaled: {list(x_TI.shape)} {x_TI.dtype} by {list(factor_T1.shape)} {factor_T1.dtype}")
    out_TI = result(x_TI.shape, x_TI.dtype)
    native_library().scaled(float_of(x_TI), x_TI.data_ptr(), factor_T1.data_ptr(), out_TI.data_ptr(), *x_TI.shape)
    return out_TI


def widen(x_TI: Tensor) -> Tensor:
    """See `reference.widen`."""
    if x_TI.dtype == torch.float32:
        return x_TI
    float_of(x_TI)
    x_TI = x_TI.contiguous()
    out_TI = result(x_TI.shape, torch.float32)
    native_library().widen(x_TI.data_ptr(), out_TI.data_ptr(), *x_TI.shape)
    return out_TI


def join(a_TA: Tensor, b_TB: Tensor) -> Tensor:
    """See `reference.join`. [T, A] or [T, H, A]."""
    a_THA, b_THB = (rows_of(x if x.dim() == 3 else x[:, None]) for x in (a_TA, b_TB))
    if a_THA.shape[:2] != b_THB.shape[:2] or a_THA.dtype != b_THB.dtype:
        raise ValueError(f"join: {list(a_TA.shape)} {a_TA.dtype} and {list(b_TB.shape)} {b_TB.dtype}")
    out = result((*a_TA.shape[:-1], a_TA.shape[-1] + b_TB.shape[-1]), a_TA.dtype)
    size, parts = a_TA.itemsize, []
    for x in (a_THA, b_THB):
        parts += [x.data_ptr(), x.stride(0) * size, x.stride(1) * size, x.shape[2] * size]
    native_library().join(*parts, out.data_ptr(), *a_THA.shape[:2])
    return out


def packed_by_head(x_THA: Tensor, packed_HX: Tensor, shape: Shape) -> Tensor:
    """See `reference_packed.packed_by_head`."""
    x_THA = rows_of(x_THA)
    tokens, heads, width = x_THA.shape
    if width != shape.inputs or heads != len(packed_HX) or shape.scale_inputs or str(x_THA.dtype) != f"torch.{shape.kind}":
        raise ValueError(f"packed_by_head: x is {list(x_THA.shape)} {x_THA.dtype}, the weight {len(packed_HX)} times {shape}")
    out_THB = result((tokens, heads, shape.outputs), x_THA.dtype)
    native_library().by_head(
        *shape.native[:3], packed_HX.data_ptr(), float_of(x_THA), x_THA.data_ptr(), *x_THA.stride()[:2], out_THB.data_ptr(), tokens, heads
    )
    return out_THB


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `reference.route`. Experts come in order of affinity, and of equal ones the first wins."""
    logits_TE = logits_TE.contiguous()
    tokens, count = logits_TE.shape
    if logits_TE.dtype != torch.float32 or (bias_E is not None and (bias_E.dtype != torch.float32 or bias_E.shape != (count,))):
        raise ValueError(f"route: logits {logits_TE.dtype}, the bias {None if bias_E is None else (bias_E.dtype, list(bias_E.shape))}")
    weight_TK, expert_TK = result((tokens, rule.top), torch.float32), result((tokens, rule.top), torch.int64)
    bias = 0 if bias_E is None else bias_E.data_ptr()
    ruled = rule.sigmoid, rule.normalise, count, rule.top, rule.groups, rule.best_groups, rule.scaling
    native_library().route(logits_TE.data_ptr(), bias, *ruled, weight_TK.data_ptr(), expert_TK.data_ptr(), tokens)
    return weight_TK, expert_TK


def experts(x_TI: Tensor, weight_TK: Tensor, expert_TK: Tensor, feeds: Feeds) -> Tensor:
    """See `reference_packed.experts`."""
    x_TI, weight_TK, expert_TK = rows_of(x_TI), weight_TK.contiguous(), expert_TK.contiguous()
    dense = [shape for shape in (feeds.wide, feeds.down) if not shape.scale_inputs]
    if x_TI.shape[1] != feeds.wide.inputs or any(str(x_TI.dtype) != f"torch.{shape.kind}" for shape in dense):
        raise ValueError(f"experts: x is {list(x_TI.shape)} {x_TI.dtype}, the weights {feeds.wide} and {feeds.down}")
    if weight_TK.dtype != torch.float32 or expert_TK.dtype != torch.int64 or weight_TK.shape != expert_TK.shape:
        raise ValueError(f"experts: weights {weight_TK.dtype} and experts {expert_TK.dtype}")
    out_TI = result((len(x_TI), feeds.down.outputs), x_TI.dtype)
    addresses = [packed.data_ptr() for packed in (*feeds.gates, *feeds.ups, *feeds.downs)]
    native_library().experts(
        feeds.wide.native,
        feeds.wide_whole,
        feeds.down.native,
        feeds.down_whole,
        addresses,
        expert_TK.shape[1],
        float_of(x_TI),
        x_TI.data_ptr(),
        x_TI.stride(0),
        weight_TK.data_ptr(),
        expert_TK.data_ptr(),
        out_TI.data_ptr(),
        len(x_TI),
    )
    return out_TI
