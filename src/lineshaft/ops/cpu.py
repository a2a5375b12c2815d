"""Kernels for processors, where the plain form of PyTorch is not the fast one.

On Intel's processors without tiles for bf16 (AMX), PyTorch's bf16 products reach two thirds of FP32's speed on long inputs.
There the operands are widened first: nothing is lost, and the result is rounded to bf16 once, as by the reference. Not on
AMD's with AVX512_BF16, where bf16 is three times as fast as FP32 (docs/log.md), and not where gradients are kept: they
would hold the widened copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.machine import made_by_amd
from lineshaft.ops import reference
from lineshaft.ops.reach import Reach

WIDE_ROWS = 96
"""From so many rows on, widening a weight costs less than it saves: equal at 64 with 2 cores and AVX-512, 3584 x 1280."""


def compiles_bfloat16() -> bool:
    """Has the processor bf16 instructions, for which oneDNN then compiles a product of each shape that it meets?"""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    if not _worth_widening(x_TI):
        return reference.linear(x_TI, weight_OI, bias_O)
    return F.linear(x_TI.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(x_TI.dtype)


def rows_gqa(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKV: Tensor, seen_BSS: Tensor | None, scale: float) -> Tensor:
    """See `reference.rows_gqa`."""
    if not _worth_widening(q_BSHD[0]):
        return reference.rows_gqa(q_BSHD, k_BSKD, v_BSKV, seen_BSS, scale)
    return reference.rows_gqa(q_BSHD.float(), k_BSKD.float(), v_BSKV.float(), seen_BSS, scale).to(q_BSHD.dtype)


def reach_gqa(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, scale: float, reach: Reach) -> Tensor:
    """See `reference.reach_gqa`."""
    if not _worth_widening(q_THD):
        return reference.reach_gqa(q_THD, k_SKD, v_SKV, scale, reach)
    return reference.reach_gqa(q_THD.float(), k_SKD.float(), v_SKV.float(), scale, reach).to(q_THD.dtype)


def paged_gqa(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, table: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """See `reference.paged_gqa`."""
    if not _worth_widening(q_THD):
        return reference.paged_gqa(q_THD, pages_k, pages_v, table, first, scale, reach)
    spans = reach.spans(first, first + len(q_THD))
    positions_S = reference.positions_of(spans, table)
    k_SKD, v_SKD = (reference.paged_rows(pages, table, positions_S).float() for pages in (pages_k, pages_v))
    return reference.in_tiles(q_THD.float(), k_SKD, v_SKD, spans, first, scale, reach).to(q_THD.dtype)


def _worth_widening(x_T: Tensor) -> bool:
    wide = x_T.dtype == torch.bfloat16 and len(x_T) >= WIDE_ROWS and not torch.is_grad_enabled()
    return wide and not (torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and made_by_amd()))
