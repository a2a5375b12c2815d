"""Kernels for processors that give a row the same bits in any company: batch invariance.

A product adds up each of its numbers in an order of its own, and PyTorch's libraries choose that order by the shape: on some
processors by the number of rows, even of many. In one shape it is the same for every row, wherever it stands. So rows are worked on
ROWS at a time, the last ones filled up with zeros, and sums over keys, of which every request has another number, are taken in
blocks of KEYS at fixed places, added in order. What a token does not see counts as exactly zero there.

Functions of single numbers are not safe either: PyTorch computes the last few of a tensor by other code than the rest.
Filling up to whole vectors avoids that. `engine/warm.py` tries all of it on the machine at hand when an engine starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.ops.experts import Rule, routed
from lineshaft.ops.fp8 import unpack_fp8
from lineshaft.ops.integers import integers

ROWS = 16
"""Rows of every product. More read weights less often when a prompt is read, fewer waste less when one token is decoded."""
KEYS = 128
"""Keys that are added up together. At most the number of inputs that the libraries take at a time, or it would be cut by them."""
_STRIDE = 64
"""PyTorch takes two vectors at a time, and single numbers by other code: bf16 in AVX-512 are the most, two times 32."""


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    return _by_rows(x_TI, lambda x_RI: F.linear(x_RI, weight_OI, bias_O))


def linear_int(x_TI: Tensor, codes: Tensor, scale_OG: Tensor, zero_XG: Tensor | None, bits: int, bias_O: Tensor | None) -> Tensor:
    """See `reference.linear_int`. Of `linear_int_a8` the reference is steady by itself: its sums are exact or go in order."""
    return linear(x_TI, integers(codes, scale_OG, zero_XG, bits).decode(x_TI.dtype), bias_O)


def linear_fp8(x_TI: Tensor, weight_OI: Tensor, scale_BC: Tensor, block: tuple[int, int], bias_O: Tensor | None) -> Tensor:
    """See `reference.linear_fp8`."""
    return linear(x_TI, unpack_fp8(weight_OI, scale_BC, block, x_TI.dtype), bias_O)


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return F.silu(_whole_vectors(gate_TI))[: len(gate_TI)] * up_TI


def sigmoid(x_TI: Tensor) -> Tensor:
    """See `reference.sigmoid`."""
    return _whole_vectors(x_TI).sigmoid()[: len(x_TI)]


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    return routed(sigmoid(logits_TE) if rule.sigmoid else logits_TE.softmax(-1), bias_E, rule)


def by_head(x_THA: Tensor, weight_HAB: Tensor) -> Tensor:
    """See `reference.by_head`."""
    return _by_rows(x_THA, lambda x_RHA: torch.bmm(x_RHA.transpose(0, 1).contiguous(), weight_HAB).transpose(0, 1))


def tile_gqa(q_NMHD: Tensor, pages_k: Tensor, pages_v: Tensor, slots_NS: Tensor, seen_NMS: Tensor, scale: float) -> Tensor:
    """See `reference.tile_gqa`."""
    heads, (tiles, queries) = pages_k.shape[-2], q_NMHD.shape[:2]
    q_XRD = q_NMHD.float().view(tiles, queries, heads, -1, q_NMHD.shape[-1]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    k_XSD, v_XSD = (_by_head(pages, slots_NS) for pages in (pages_k, pages_v))
    out_XRD = _attended(q_XRD * scale, k_XSD, v_XSD, seen_NMS)
    return out_XRD.view(tiles, heads, queries, -1, out_XRD.shape[-1]).transpose(1, 2).flatten(2, 3).to(q_NMHD.dtype)


def tile_mla(q_NMHE: Tensor, pages: Tensor, slots_NS: Tensor, seen_NMS: Tensor, scale: float, latent: int) -> Tensor:
    """See `reference.tile_mla`."""
    tiles, queries, heads, width = q_NMHE.shape
    entry_NSE = pages.flatten(0, 1)[slots_NS].float()
    out_NRC = _attended(q_NMHE.float().view(tiles, queries * heads, width) * scale, entry_NSE, entry_NSE[..., :latent], seen_NMS)
    return out_NRC.view(tiles, queries, heads, latent).to(q_NMHE.dtype)


def filled(x_T: Tensor, step: int) -> Tensor:
    """Rows of zeros added until their number is a multiple of `step`."""
    missing = -len(x_T) % step
    return F.pad(x_T, (*(0, 0) * (x_T.dim() - 1), 0, missing)) if missing else x_T


def _by_rows(x_T: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """`product` of ROWS rows at a time."""
    return torch.cat([product(rows) for rows in torch.split(filled(x_T, ROWS), ROWS)])[: len(x_T)]


def _products(x_XRA: Tensor, y_XAB: Tensor) -> Tensor:
    """bmm of ROWS rows at a time; R is a multiple of it."""
    return torch.cat([torch.bmm(rows.contiguous(), y_XAB) for rows in torch.split(x_XRA, ROWS, 1)], 1)


def _whole_vectors(x_TI: Tensor) -> Tensor:
    """Rows added until the numbers are whole vectors, as many for each thread: threads get equal shares."""
    lanes = _STRIDE * torch.get_num_threads()
    return filled(x_TI, lanes // math.gcd(x_TI.shape[-1], lanes))


def _by_head(pages: Tensor, slots_NS: Tensor) -> Tensor:
    """float32 [N * K, S, D]: the entries in these slots, those of each head together."""
    return pages.flatten(0, 1)[slots_NS].transpose(1, 2).float().flatten(0, 1)


def _attended(q_XRD: Tensor, k_XSD: Tensor, v_XSV: Tensor, seen_NMS: Tensor) -> Tensor:
    """Softmax attention of X independent sets of R queries, in float32; R is M queries of each of the heads that share a key head.

    Sums over keys are of blocks of KEYS, added up in order. The greatest score is no sum, and the same in any order.
    """
    sets, rows, _ = q_XRD.shape
    tiles, queries, keys = seen_NMS.shape
    scores_XRS = _products(F.pad(q_XRD, (0, 0, 0, -rows % ROWS)), k_XSD.transpose(1, 2))
    by_query = scores_XRS.view(tiles, sets // tiles, -1, keys)[:, :, :rows].view(tiles, sets // tiles, queries, rows // queries, keys)
    by_query.masked_fill_(~seen_NMS[:, None, :, None], -torch.inf)
    chances = scores_XRS.sub_(scores_XRS.amax(-1, keepdim=True)).exp_()
    total_XR1 = chances.view(sets, -1, keys // KEYS, KEYS).sum(-1).cumsum(-1)[..., -1:]  # cumsum goes from the first to the last
    out_XRV = _products(chances[..., :KEYS], v_XSV[:, :KEYS])
    for start in range(KEYS, keys, KEYS):
        out_XRV.add_(_products(chances[..., start : start + KEYS], v_XSV[:, start : start + KEYS]))
    return (out_XRV / total_XR1)[:, :rows]
