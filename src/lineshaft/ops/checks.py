"""What the native kernels are given, looked at before addresses are handed over: behind them nothing is checked any more.

Strides of inputs are dealt with in ops/native.py. Pages are never copied: one call would take as long as many steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lineshaft.ops.entries import entry_bytes
from lineshaft.ops.neighbours import MOST
from lineshaft.ops.neighbours import alike as alike_shapes
from lineshaft.ops.packing import Shape
from lineshaft.ops.sampling import COLUMNS

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute on, as the library numbers it."""
WIDEST = 1024
"""Channels of a head that the attention kernel has room for."""


def float_of(x: Tensor) -> int:
    """The number of the dtype of x."""
    if x.dtype not in FLOATS:
        raise ValueError(f"native kernels work on float32 and bfloat16, not on {x.dtype}")
    return FLOATS[x.dtype]


def linear(x_TI: Tensor, packed: Tensor, shape: Shape, bias_O: Tensor | None, size: int, whole: bool, input_scale: float) -> None:
    """`size`: bytes of a weight of this shape."""
    if x_TI.dim() != 2 or x_TI.shape[1] != shape.inputs or (not shape.scale_inputs and str(x_TI.dtype) != f"torch.{shape.kind}"):
        raise ValueError(f"packed_linear: x is {list(x_TI.shape)} {x_TI.dtype}, the weight {shape}")
    if packed.dtype != torch.uint8 or packed.numel() != size or not packed.is_contiguous():
        raise ValueError(f"packed_linear: the weight is {list(packed.shape)} {packed.dtype}: {shape} takes {size} bytes in a row")
    if bias_O is not None and bias_O.shape != (shape.outputs,):
        raise ValueError(f"packed_linear: the bias is {list(bias_O.shape)}, the weight has {shape.outputs} outputs")
    if whole and shape.kind not in ("int8", "int4"):
        raise ValueError(f"packed_linear: activations in 8 bits need a weight of whole numbers, not {shape}")
    if input_scale and not (whole and 0 < input_scale < math.inf):
        raise ValueError(f"packed_linear: {input_scale} is no scale for activations {'in 8 bits' if whole else 'as they are'}")


def neighbours(shapes: tuple[Shape, ...]) -> None:
    """Weights that meet the same activations in one call."""
    if not alike_shapes(shapes):
        raise ValueError(f"packed weights side by side: at most {MOST}, alike but for their outputs, not {shapes}")


def norm(x: Tensor, weight_I: Tensor) -> None:
    """One weight a channel."""
    if weight_I.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x is {list(x.shape)}, the weight {list(weight_I.shape)}")


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """An angle for each pair of channels of a token."""
    wanted = len(x_THD), x_THD.shape[-1] // 2
    if x_THD.dim() != 3 or x_THD.shape[-1] % 2 or cos_TR.shape != wanted or sin_TR.shape != wanted:
        raise ValueError(f"rope: x is {list(x_THD.shape)}, cosines are {list(cos_TR.shape)} and sines {list(sin_TR.shape)}")
    if cos_TR.dtype != torch.float32 or sin_TR.dtype != torch.float32:
        raise ValueError(f"rope: cosines and sines must be float32, not {cos_TR.dtype} and {sin_TR.dtype}")


def alike(op: str, a: Tensor, b: Tensor) -> None:
    """Two tensors that meet number by number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"{op}: {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}")


def attention(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, chunks_C4: Tensor, tables: Tensor) -> None:
    """The numbers in chunks and tables are the caller's: reading them would cost more than attention over a short text."""
    float_of(q_THD)
    _dtypes("paged_attention", q_THD, (pages_k, pages_v), q_THD.dtype, chunks_C4, tables)
    if pages_k.dim() != 4 or q_THD.shape[-1:] != pages_k.shape[3:]:
        raise _shapes("paged_attention", q_THD, pages_k, pages_v, chunks_C4, tables)
    _pages("paged_attention", q_THD, pages_k, pages_v, pages_v.shape[-1], chunks_C4, tables)


def choosing(q_TJD: Tensor, weight_TJ: Tensor, pages: Tensor, chunks_C4: Tensor, tables: Tensor, top_k: int) -> None:
    """Of an indexer: one key for all heads."""
    float_of(q_TJD)
    _dtypes("choose_keys", q_TJD, (pages, pages), q_TJD.dtype, chunks_C4, tables)
    if pages.dim() != 3 or q_TJD.shape[2:] != pages.shape[2:] or weight_TJ.shape != q_TJD.shape[:2] or weight_TJ.dtype != torch.float32:
        found = f"weights {list(weight_TJ.shape)} {weight_TJ.dtype}, pages {list(pages.shape)}"
        raise ValueError(f"choose_keys: queries {list(q_TJD.shape)}, {found}")
    _pages("choose_keys", q_TJD, pages[:, :, None], pages[:, :, None], 0, chunks_C4, tables)
    if top_k < 1:
        raise ValueError(f"choose_keys: {top_k} keys to choose: at least 1")


def coded_attention(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, values: int, chunks_C4: Tensor, tables: Tensor) -> None:
    """Entries of both as wide as queries."""
    float_of(q_THD)
    _dtypes("coded_attention", q_THD, (pages_k, pages_v), torch.uint8, chunks_C4, tables)
    width = q_THD.shape[-1]
    if pages_k.shape != pages_v.shape or pages_k.shape[-1] != entry_bytes(width):
        found = f"entries of {pages_k.shape[-1]} and {pages_v.shape[-1]} bytes"
        raise ValueError(f"coded_attention: {found}: for queries of {width} channels both take {entry_bytes(width)}")
    if not 0 < values <= width:
        raise ValueError(f"coded_attention: values of {values} channels, entries have {width}")
    _pages("coded_attention", q_THD, pages_k, pages_v, values, chunks_C4, tables)


def codes(pages: Tensor, slots_T: Tensor, entry: Tensor) -> None:
    """Room for an entry in each slot."""
    wanted = (*entry.shape[1:-1], entry_bytes(entry.shape[-1]))
    if entry.dim() not in (2, 3) or pages.dtype != torch.uint8 or pages.shape[2:] != wanted or slots_T.dtype != torch.int64:
        raise ValueError(f"write_codes: {list(entry.shape)} into pages of {list(pages.shape)} {pages.dtype}: slots take {wanted}")
    if slots_T.shape != entry.shape[:1] or not slots_T.is_contiguous() or not pages.is_contiguous():
        raise ValueError(f"write_codes: {len(entry)} tokens, {list(slots_T.shape)} slots; these and pages must lie in a row in memory")


def _dtypes(op: str, q_THD: Tensor, pages: tuple[Tensor, Tensor], wanted: torch.dtype, chunks_C4: Tensor, tables: Tensor) -> None:
    """Of everything that attention is given."""
    if any(each.dtype != wanted for each in pages) or tables.dtype != torch.int32 or chunks_C4.dtype != torch.int64:
        told = f"pages {pages[0].dtype} and {pages[1].dtype}"
        raise ValueError(f"{op}: queries {q_THD.dtype}, {told}, tables {tables.dtype}, chunks {chunks_C4.dtype}")


def _pages(op: str, q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, values: int, chunks_C4: Tensor, tables: Tensor) -> None:
    """Shapes, and where pages lie; `values`: channels of a head's values."""
    if not _meet(q_THD, pages_k, pages_v) or chunks_C4.shape[1:] != (4,) or tables.dim() != 1:
        raise _shapes(op, q_THD, pages_k, pages_v, chunks_C4, tables)
    width = q_THD.shape[2]
    if width % 2 or max(width, values) > WIDEST:
        raise ValueError(f"{op}: heads of {width} and {values} channels: at most {WIDEST}, and an even number for keys")
    if not _in_a_row(pages_k) or not _in_a_row(pages_v):
        raise ValueError(f"{op}: pages must follow each other in memory, channels too; strided pages are not copied")


def _shapes(op: str, *given: Tensor) -> ValueError:
    names = "queries", "keys", "values", "chunks", "tables"
    return ValueError(f"{op}: {', '.join(f'{name} {list(each.shape)}' for name, each in zip(names, given, strict=True))}")


def _meet(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor) -> bool:
    """Do queries, keys and values belong together?"""
    if q_THD.dim() != 3 or pages_k.dim() != 4 or pages_k.shape[:3] != pages_v.shape[:3]:
        return False
    return q_THD.shape[1] % pages_k.shape[2] == 0


def _in_a_row(pages: Tensor) -> bool:
    """Is token t of page p where the kernel looks for it, (p * B + t) strides from the beginning, its channels side by side?"""
    count, size, _, width = pages.shape
    return (count == 1 or pages.stride(0) == size * pages.stride(1)) and (width == 1 or pages.stride(3) == 1)


def sample(logits_RV: Tensor, choices_R5: Tensor) -> None:
    """A row of choices for each row of logits."""
    fit = logits_RV.dim() == 2 and logits_RV.shape[1] and choices_R5.shape == (len(logits_RV), COLUMNS)
    if not fit or logits_RV.dtype != torch.float32 or choices_R5.dtype != torch.float64:
        shapes = f"{list(logits_RV.shape)} {logits_RV.dtype}, choices {list(choices_R5.shape)} {choices_R5.dtype}"
        raise ValueError(f"sample: logits {shapes}: float32 [R, V] and float64 [R, {COLUMNS}] are wanted")
