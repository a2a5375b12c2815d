"""The reference of every op: plain PyTorch, short and right. A faster kernel must agree with these on random shapes.

Shape letters: T tokens in the packed batch, I inputs, O outputs, G groups of inputs that share a scale, H query heads,
K key-value heads, D head width, C latent width, R rotary width, S tokens of context, P pages, B tokens in a page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b. Result [T, O] in the dtype of x."""
    return F.linear(x_TI, weight_OI, bias_O)


def linear_int8(x_TI: Tensor, packed_OJ: Tensor, scale_OG: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b for INT8 weights with one scale a group of inputs (G = 1: one a channel).

    packed_OJ: int32 [O, I/4], four weights a word, lowest byte first, each stored as value + 128 (the `pack-quantized`
    layout of compressed-tensors). Result [T, O] in the dtype of x.
    """
    return F.linear(x_TI, unpack_int8(packed_OJ, scale_OG, x_TI.dtype), bias_O)


def unpack_int8(packed_OJ: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that `linear_int8` multiplies by: [O, I] in `dtype`."""
    signed_OI = packed_OJ.view(torch.uint8).to(torch.float32) - 128
    scaled_OGI = signed_OI.view(*scale_OG.shape, -1) * scale_OG.to(torch.float32)[:, :, None]
    return scaled_OGI.flatten(1).to(dtype)


def rms_norm(x_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w, in float32, result in the dtype of x (Zhang and Sennrich 2019, eq. 4)."""
    x = x_TI.float()
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_I * scaled.to(x_TI.dtype)).to(x_TI.dtype)


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, section 3.4.2).

    cos_TR, sin_TR: float32 [T, D/2]. Pairs are (2i, 2i+1) when interleaved (DeepSeek), else (i, i + D/2) (Llama).
    The output keeps the layout of the input.
    """
    x = x_THD.float()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x_THD.dtype)


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """SiLU(gate) * up, the SwiGLU product (Shazeer 2020, eq. 6)."""
    return F.silu(gate_TI) * up_TI


def paged_gqa(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, table: Tensor, first: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of one request's T newest tokens over its paged keys and values.

    pages_k, pages_v: [P, B, K, D]; table: int64 page numbers of this request in order; `first`: position of the first of
    the T tokens, whose keys are already in the pages. `window`: a token sees itself and the window - 1 tokens before.
    Result [T, H, D].
    """
    context = first + q_THD.shape[0]
    k_KSD = pages_k[table].flatten(0, 1)[:context].transpose(0, 1)
    v_KSD = pages_v[table].flatten(0, 1)[:context].transpose(0, 1)
    visible = visible_from(first, q_THD.shape[0], context, window, q_THD.device)
    out = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None], k_KSD[None], v_KSD[None], attn_mask=visible, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def paged_mla(q_THC: Tensor, q_rope_THR: Tensor, pages: Tensor, table: Tensor, first: int, scale: float) -> Tensor:
    """Absorbed latent attention of one request's T newest tokens over its paged latents.

    pages: [P, B, C + R], each entry a normalised latent followed by the rotated shared key. q_THC: queries already taken
    through the key half of the up-projection. Result [T, H, C], still to be taken through the value half
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    latent = q_THC.shape[-1]
    context = first + q_THC.shape[0]
    entries_SE = pages[table].flatten(0, 1)[:context]
    latent_SC, k_rope_SR = entries_SE[:, :latent], entries_SE[:, latent:]
    scores_HTS = torch.einsum("thc,sc->hts", q_THC, latent_SC) + torch.einsum("thr,sr->hts", q_rope_THR, k_rope_SR)
    visible = visible_from(first, q_THC.shape[0], context, None, q_THC.device)
    weights = (scores_HTS.float() * scale).masked_fill(~visible, -torch.inf).softmax(-1).to(q_THC.dtype)
    return torch.einsum("hts,sc->thc", weights, latent_SC)


def visible_from(first: int, queries: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [queries, context]: may the token at position first + i see position j?"""
    q_T = torch.arange(first, first + queries, device=device)[:, None]
    k_S = torch.arange(context, device=device)[None, :]
    visible = k_S <= q_T
    return visible if window is None else visible & (q_T - k_S < window)
