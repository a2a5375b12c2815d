"""The native kernels behind the op table: shapes and dtypes are checked here, addresses go to the library (native/src).

Every one of them gives a row the same bits in any company: sums run in an order that does not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.ops import checks
from lineshaft.ops.reach import Blocks, Reach, Window
from lineshaft.ops.recording import native_library, result

SHARED = 2
"""Tokens a thread up to which threads share each token's positions; of more, each takes whole tokens."""
STEP = 64
"""kStep of native/src/bench.h."""


def rms_norm(x: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    checks.norm(x, weight_I)
    kind, rows_TI, weight_I = checks.float_of(x), rows_of(x.flatten(0, -2)), weight_I.contiguous()
    (rows, width), out = rows_TI.shape, result(x.shape, x.dtype)
    weight, tokens = (checks.float_of(weight_I), weight_I.data_ptr()), len(x)
    per_token = rows // tokens if tokens else 1
    native_library().norm(kind, rows_TI.data_ptr(), rows_TI.stride(0), *weight, eps, out.data_ptr(), width, tokens, per_token, width)
    return out


def layer_norm(x_TI: Tensor, weight_I: Tensor, bias_I: Tensor, eps: float) -> Tensor:
    """See `reference.layer_norm`."""
    checks.norm(x_TI, weight_I)
    checks.norm(x_TI, bias_I)
    kind, x_TI, weight_I, bias_I = checks.float_of(x_TI), rows_of(x_TI), weight_I.contiguous(), bias_I.contiguous()
    weight, bias = ((checks.float_of(learnt_I), learnt_I.data_ptr()) for learnt_I in (weight_I, bias_I))
    out = result(x_TI.shape, x_TI.dtype)
    native_library().layer_norm(kind, x_TI.data_ptr(), x_TI.stride(0), *weight, *bias, eps, out.data_ptr(), *x_TI.shape)
    return out


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """See `reference.rope`."""
    checks.rope(x_THD, cos_TR, sin_TR)
    kind, x_THD, cos_TR, sin_TR = checks.float_of(x_THD), rows_of(x_THD), cos_TR.contiguous(), sin_TR.contiguous()
    out = result(x_THD.shape, x_THD.dtype)
    native_library().rope(
        kind, x_THD.data_ptr(), *x_THD.stride()[:2], cos_TR.data_ptr(), sin_TR.data_ptr(), interleaved, out.data_ptr(), *x_THD.shape
    )
    return out


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    checks.alike("silu_mul", gate_TI, up_TI)
    gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    out = result(gate_TI.shape, gate_TI.dtype)
    native_library().silu_mul(checks.float_of(gate_TI), gate_TI.data_ptr(), up_TI.data_ptr(), out.data_ptr(), *_tokens_and_width(out))
    return out


def add(x_TI: Tensor, y_TI: Tensor) -> Tensor:
    """See `reference.add`."""
    checks.alike("add", x_TI, y_TI)
    x_TI, y_TI = x_TI.contiguous(), y_TI.contiguous()
    out = result(x_TI.shape, x_TI.dtype)
    native_library().add(checks.float_of(x_TI), x_TI.data_ptr(), y_TI.data_ptr(), out.data_ptr(), *_tokens_and_width(out))
    return out


def embed(tokens_T: Tensor, weight_VI: Tensor) -> Tensor:
    """See `reference.embed`."""
    checks.float_of(weight_VI)
    weight_VI = weight_VI.contiguous()
    out_TI = result((len(tokens_T), weight_VI.shape[1]), weight_VI.dtype)
    native_library().take_rows(
        weight_VI.data_ptr(), weight_VI.stride(0) * weight_VI.itemsize, tokens_T.data_ptr(), out_TI.data_ptr(), len(tokens_T)
    )
    return out_TI


def angles(positions_T: Tensor, speed_R: Tensor, length: float) -> Tensor:
    """See `reference.angles`."""
    out_2TR = result((2, len(positions_T), speed_R.shape[-1]), torch.float32)
    cos, sin = out_2TR.data_ptr(), out_2TR.data_ptr() + out_2TR.stride(0) * out_2TR.itemsize
    stride, count = (0 if speed_R.dim() == 1 else speed_R.stride(0)), speed_R.shape[-1]
    native_library().angles(positions_T.data_ptr(), speed_R.data_ptr(), stride, count, length, cos, sin, len(positions_T))
    return out_2TR


def write_pages(pages: Tensor, slots_T: Tensor, entry: Tensor) -> Tensor:
    """See `reference.write_pages`."""
    entry, flat = rows_of(entry.flatten(1)), pages.flatten(0, 1).flatten(1)
    if entry.dtype != pages.dtype or entry.shape[1] != flat.shape[1] or slots_T.dtype != torch.int64:
        raise ValueError(f"write_pages: {list(entry.shape)} {entry.dtype} into pages of {list(pages.shape)} {pages.dtype}")
    size, width = entry.itemsize, entry.shape[1]
    native_library().put_rows(entry.data_ptr(), entry.stride(0) * size, width * size, slots_T.data_ptr(), flat.data_ptr(), len(entry))
    return pages


def paged_attention(
    q_THD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    chunks_C4: Tensor,
    tables: Tensor,
    scale: float,
    reach: Reach,
    count_1: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_attention`."""
    checks.attention(q_THD, pages_k, pages_v, chunks_C4, tables)
    return _attended(q_THD, pages_k, pages_v, pages_v.shape[-1], chunks_C4, tables, scale, reach, count_1)


def choose_keys(
    q_TJD: Tensor,
    weight_TJ: Tensor,
    pages: Tensor,
    chunks_C4: Tensor,
    tables: Tensor,
    top_k: int,
    reach: Reach,
    longest: int,
    count_1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference_indexer.choose_keys`."""
    checks.choosing(q_TJD, weight_TJ, pages, chunks_C4, tables, top_k)
    kind, (q_TJD, weight_TJ, chunks_C4, tables) = checks.float_of(q_TJD), (x.contiguous() for x in (q_TJD, weight_TJ, chunks_C4, tables))
    tokens, heads, width = q_TJD.shape
    count_1 = torch.tensor([len(chunks_C4)]) if count_1 is None else count_1
    if not tokens:
        return torch.empty(0, top_k, dtype=torch.int32), torch.empty(0, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    room_RS = result((SHARED * native_library().threads(), -(-longest // STEP) * STEP), torch.float32)
    slots_TK, found_T4, found_1 = result((tokens, top_k), torch.int32), result((tokens, 4), torch.int64), result((1,), torch.int64)
    native_library().choose_keys(
        kind,
        q_TJD.data_ptr(),
        weight_TJ.data_ptr(),
        pages.data_ptr(),
        pages.stride(1),
        pages.shape[1],
        chunks_C4.data_ptr(),
        count_1.data_ptr(),
        tables.data_ptr(),
        *_numbers(reach),
        width**-0.5,
        heads,
        width,
        top_k,
        room_RS.data_ptr(),
        *room_RS.shape,
        slots_TK.data_ptr(),
        found_T4.data_ptr(),
        found_1.data_ptr(),
        tokens,
    )
    return slots_TK, found_T4, found_1


def write_codes(pages: Tensor, slots_T: Tensor, entry: Tensor) -> Tensor:
    """See `reference.write_codes`."""
    kind, entry_THE = checks.float_of(entry), rows_of(entry if entry.dim() == 3 else entry[:, None])
    checks.codes(pages, slots_T, entry)
    native_library().write_codes(
        kind, entry_THE.data_ptr(), *entry_THE.stride()[:2], slots_T.data_ptr(), pages.data_ptr(), *entry_THE.shape
    )
    return pages


def coded_attention(
    q_THD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    values: int,
    chunks_C4: Tensor,
    tables: Tensor,
    scale: float,
    reach: Reach,
    count_1: Tensor | None = None,
) -> Tensor:
    """See `reference.coded_attention`."""
    checks.coded_attention(q_THD, pages_k, pages_v, values, chunks_C4, tables)
    return _attended(q_THD, pages_k, pages_v, values, chunks_C4, tables, scale, reach, count_1)


def _attended(
    q_THD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    values: int,
    chunks_C4: Tensor,
    tables: Tensor,
    scale: float,
    reach: Reach,
    count_1: Tensor | None,
) -> Tensor:
    """Of pages that were looked at: their bytes are codes where they are no floats."""
    kind, coded = checks.float_of(q_THD), pages_k.dtype == torch.uint8
    q_THD, chunks_C4, tables = q_THD.contiguous(), chunks_C4.contiguous(), tables.contiguous()
    heads, width = q_THD.shape[1:]
    count_1 = torch.tensor([len(chunks_C4)]) if count_1 is None else count_1
    out_THV = result((len(q_THD), heads, values), q_THD.dtype)
    native_library().attention(
        kind,
        coded,
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
        count_1.data_ptr(),
        tables.data_ptr(),
        *_numbers(reach),
        scale,
        heads,
        pages_k.shape[2],
        width,
        values,
        out_THV.data_ptr(),
        len(q_THD),
    )
    return out_THV


def sample(logits_RV: Tensor, choices_R5: Tensor) -> Tensor:
    """See `reference.sample`."""
    checks.sample(logits_RV, choices_R5)
    logits_RV, choices_R5 = rows_of(logits_RV), choices_R5.contiguous()
    rows, width = logits_RV.shape
    out_R = result((rows,), torch.int64)
    native_library().sample(logits_RV.data_ptr(), logits_RV.stride(0), width, choices_R5.data_ptr(), out_R.data_ptr(), rows)
    return out_R


def _tokens_and_width(x: Tensor) -> tuple[int, int]:
    return len(x), x[0].numel() if len(x) else 0


def _numbers(reach: Reach) -> tuple[int, int, int, int]:
    """Kind and numbers, as native/src/kernels.h has them."""
    if isinstance(reach, Window):
        return 1, reach.window, reach.global_tokens, 0
    if isinstance(reach, Blocks):
        return 2, reach.block, reach.local_blocks, reach.stride
    return 0, 0, 0, 0


def rows_of(x: Tensor) -> Tensor:
    """With the channels of a row side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
