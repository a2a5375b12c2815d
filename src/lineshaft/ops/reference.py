"""The reference of every op: plain PyTorch, short and right. A faster kernel must agree with these on random shapes.

Those of packed weights are in reference_packed.py.

Shape letters: T tokens in the packed batch, I inputs, O outputs, G groups of inputs that share a scale, H query heads,
K key-value heads, D head width, V value width, C latent width, R rotary width, S tokens of context, U some of them, P pages,
B tokens in a page, or rows, N tiles of M queries each, E what one token leaves in one page.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.ops import coded_pages
from lineshaft.ops.experts import Rule, affinity, routed
from lineshaft.ops.fp8 import unpack_fp8
from lineshaft.ops.integers import integers, rounded
from lineshaft.ops.reach import Reach, Span, Window
from lineshaft.ops.sampling import chosen

QUERIES = 192
"""Neighbouring queries that go over the same keys together, where they see many; a third of it where they see few.

Fewer waste fewer keys on those that only one of them sees; from 192 on PyTorch's kernel works in larger blocks.
"""

EXACT_INPUTS = 1024
"""Products of whole numbers up to 128 and 128 that float32 adds up exactly in any order: 1024 * 128 * 128 = 2^24."""


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b. Result [T, O] in the dtype of x."""
    return F.linear(x_TI, weight_OI, bias_O)


def linear_int(x_TI: Tensor, codes: Tensor, scale_OG: Tensor, zero_XG: Tensor | None, bits: int, bias_O: Tensor | None) -> Tensor:
    """x W^T + b for integer weights with one scale a group of inputs (G = 1: one a channel); activations are not rounded.

    codes, scale_OG, zero_XG, bits: the weight as stored, see `integers.integers`. Result [T, O] in the dtype of x.
    """
    return F.linear(x_TI, integers(codes, scale_OG, zero_XG, bits).decode(x_TI.dtype), bias_O)


def linear_int_a8(
    x_TI: Tensor, codes: Tensor, scale_OG: Tensor, zero_XG: Tensor | None, bits: int, bias_O: Tensor | None, input_scale: float = 0.0
) -> Tensor:
    """`linear_int` with activations rounded to 8 bits, by a scale a token or by `input_scale` (`integers.rounded`).

    scale_T * sum over groups of scale_OG * (sum of q * (code - zero) over the group) + b: inner sums are exact, the rest is
    in float64, group after group, and is rounded to the dtype of x at the end. So a row's bits don't depend on its company.
    """
    weight, (q_TI, scale_T1) = integers(codes, scale_OG, zero_XG, bits), rounded(x_TI, input_scale)
    total_TO = torch.zeros(len(q_TI), len(scale_OG), dtype=torch.float64, device=x_TI.device)
    width = q_TI.shape[1] // scale_OG.shape[1]
    for start in range(0, q_TI.shape[1], width):
        scale_O, zero_O1 = weight.scale_OG[:, start // width].double(), weight.zero_OG[:, start // width, None]
        for part in range(start, start + width, EXACT_INPUTS):
            inputs = slice(part, min(part + EXACT_INPUTS, start + width))
            dot_TO = F.linear(q_TI[:, inputs], weight.codes_OI[:, inputs].float().sub_(zero_O1))
            total_TO += dot_TO.double().mul_(scale_O)
    total_TO *= scale_T1
    return (total_TO if bias_O is None else total_TO.add_(bias_O)).to(x_TI.dtype)


def linear_fp8(x_TI: Tensor, weight_OI: Tensor, scale_BC: Tensor, block: tuple[int, int], bias_O: Tensor | None) -> Tensor:
    """x W^T + b for FP8 weights (float8_e4m3fn) with one scale a block of outputs x inputs; activations are not rounded.

    scale_BC: [O / block[0], I / block[1]] rounded up: blocks at the edges may be smaller. Result [T, O] in the dtype of x.
    """
    return F.linear(x_TI, unpack_fp8(weight_OI, scale_BC, block, x_TI.dtype), bias_O)


def rms_norm(x_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w, in float32, result in the dtype of x (Zhang and Sennrich 2019, eq. 4)."""
    x = x_TI.float()
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_I * scaled.to(x_TI.dtype)).to(x_TI.dtype)


def layer_norm(x_TI: Tensor, weight_I: Tensor, bias_I: Tensor, eps: float) -> Tensor:
    """Less the mean and scaled to unit variance over the last dimension, then by a learnt weight and bias (Ba et al., arXiv 1607.06450)."""
    return F.layer_norm(x_TI, weight_I.shape, weight_I, bias_I, eps)


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, section 3.4.2). The layout stays.

    cos_TR, sin_TR: float32 [T, D/2]. Pairs are (2i, 2i+1) when interleaved (DeepSeek), else (i, i + D/2) (Llama).
    """
    x = x_THD.float()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x_THD.dtype)


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """SiLU(gate) * up, the SwiGLU product (Shazeer 2020, eq. 6)."""
    return F.silu(gate_TI) * up_TI


def add(x_TI: Tensor, y_TI: Tensor) -> Tensor:
    """x + y."""
    return x_TI + y_TI


def scaled(x_TI: Tensor, factor_T1: Tensor) -> Tensor:
    """Each token times a number of its own."""
    return factor_T1 * x_TI


def widen(x_TI: Tensor) -> Tensor:
    """In float32."""
    return x_TI.float()


def join(a_TA: Tensor, b_TB: Tensor) -> Tensor:
    """Two tensors [T, ..., A] and [T, ..., B] side by side: [T, ..., A + B]."""
    return torch.cat([a_TA, b_TB], -1)


def embed(tokens_T: Tensor, weight_VI: Tensor) -> Tensor:
    """The rows of the embedding for these tokens: [T, I]."""
    return F.embedding(tokens_T, weight_VI)


def angles(positions_T: Tensor, speed_R: Tensor, length: float) -> Tensor:
    """Cosines and sines of position * speed, times `length`: float32 [2, T, R]. speed: [R], or [T, R] of each token."""
    angle_TR = positions_T.float()[:, None] * speed_R
    return torch.stack((angle_TR.cos() * length, angle_TR.sin() * length))


def sigmoid(x_TI: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return x_TI.sigmoid()


def rows_gqa(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKV: Tensor, seen_BSS: Tensor | None, scale: float) -> Tensor:
    """Attention inside each of B rows. `seen_BSS`: bool, may this query see that key; None: causal. Result [B, S, H, V]."""
    q_BHSD, k_BKSD, v_BKSV = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, _as_wide(v_BSKV, q_BSHD)))
    mask = None if seen_BSS is None else seen_BSS[:, None]
    grouped = q_BSHD.shape[2] != k_BSKD.shape[2]
    out_BHSV = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSV, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out_BHSV.transpose(1, 2)[..., : v_BSKV.shape[-1]]


def attention(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, seen_TS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of T queries over the S keys that each may see (None: all). Result [T, H, V].

    The queries that share a key head become rows of one product: a decoding step reads each key once, not once a head.
    """
    shared = q_THD.shape[1] // k_SKD.shape[1]
    return _folded(q_THD, k_SKD, v_SKV, None if seen_TS is None else seen_TS.repeat_interleave(shared, 0), scale)


def _folded(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, mask_RS: Tensor | None, scale: float) -> Tensor:
    """`attention` with a row of the mask for each query of a key head: T x H/K."""
    tokens, _, width = q_THD.shape
    q_KRD = q_THD.view(tokens, k_SKD.shape[1], -1, width).transpose(0, 1).flatten(1, 2)
    k_KSD, v_KSV = k_SKD.transpose(0, 1), _as_wide(v_SKV, q_THD).transpose(0, 1)
    out_KRV = F.scaled_dot_product_attention(q_KRD[None], k_KSD[None], v_KSV[None], mask_RS, scale=scale)[0, ..., : v_SKV.shape[-1]]
    return out_KRV.view(len(out_KRV), tokens, -1, v_SKV.shape[-1]).transpose(0, 1).flatten(1, 2)


def reach_gqa(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, scale: float, reach: Reach) -> Tensor:
    """Attention of one document's last T tokens over its S. Result [T, H, V].

    What `reach` hides costs nothing: only the spans that it names are multiplied.
    """
    return in_tiles(q_THD, k_SKD, v_SKV, [(0, len(k_SKD))], len(k_SKD) - len(q_THD), scale, reach)


def paged_rows(pages: Tensor, table: Tensor, positions_S: Tensor) -> Tensor:
    """Entries [S, ...] at these positions of one request. pages: [P, B, ...]; table: int64 page numbers in order of position."""
    size = pages.shape[1]
    return pages.flatten(0, 1).index_select(0, table[positions_S // size] * size + positions_S % size)


def paged_gqa(q_THD: Tensor, pages_k: Tensor, pages_v: Tensor, table: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """Attention of one request's T newest tokens over its paged keys and values. Result [T, H, D].

    pages_k, pages_v: [P, B, K, D]; table: int64 page numbers of this request in order; `first`: position of the first of
    the T tokens, whose keys are already in the pages. Only what `reach` lets them see is read.
    """
    spans = reach.spans(first, first + len(q_THD))
    positions_S = positions_of(spans, table)
    k_SKD, v_SKD = paged_rows(pages_k, table, positions_S), paged_rows(pages_v, table, positions_S)
    return in_tiles(q_THD, k_SKD, v_SKD, spans, first, scale, reach)


def paged_mla(q_THC: Tensor, q_rope_THR: Tensor, pages: Tensor, table: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """Absorbed latent attention of one request's T newest tokens over its paged latents, as one key-value head.

    pages: [P, B, C + R], each entry a normalised latent followed by the rotated shared key. q_THC: queries already taken
    through the key half of the up-projection. Result [T, H, C], still to be taken through the value half
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    spans = reach.spans(first, first + len(q_THC))
    entries_SE = paged_rows(pages, table, positions_of(spans, table))[:, None]
    # The rotated key is taken along as values and dropped: equal widths let PyTorch fuse, and nothing is copied.
    return in_tiles(torch.cat([q_THC, q_rope_THR], -1), entries_SE, entries_SE, spans, first, scale, reach)[..., : q_THC.shape[-1]]


def paged_chosen_mla(q_THC: Tensor, q_rope_THR: Tensor, pages: Tensor, table: Tensor, chosen_TS: Tensor, scale: float) -> Tensor:
    """`paged_mla` over chosen tokens: bool [T, S], S tokens of context. What no query has chosen is not read."""
    positions_U = chosen_TS.any(0).nonzero()[:, 0]
    entries_UE = paged_rows(pages, table, positions_U)[:, None]
    seen_TU = None if len(chosen_TS) == 1 else chosen_TS[:, positions_U]
    return attention(torch.cat([q_THC, q_rope_THR], -1), entries_UE, entries_UE, seen_TU, scale)[..., : q_THC.shape[-1]]


def write_pages(pages: Tensor, slots_T: Tensor, entry: Tensor) -> Tensor:
    """Put each token's entry [T, ...] into its slot (page * B + place) of pages [P, B, ...], in place; the pages."""
    pages.flatten(0, 1)[slots_T] = entry
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
    """Attention of C chunks of neighbouring tokens, each of one request, over its paged keys and values. Result [T, H, V].

    pages_k, pages_v: [P, B, K, D] and [P, B, K, V]; latent attention has K = 1 and values within its keys. chunks_C4: int64,
    first row, position of the first token, tokens, where its page numbers begin in `tables` (int32; negative: given back).
    The keys of the T tokens are in the pages already. count_1: int64 [1], how many of the chunks there are (None: all).
    """
    outs = [q_THD.new_empty(0, q_THD.shape[1], pages_v.shape[-1])]
    for row, first, count, start in chunks_C4[: None if count_1 is None else int(count_1)].tolist():
        table = tables[start : start - (-(first + count) // pages_k.shape[1])].long().clamp(min=0)
        spans = reach.spans(first, first + count)
        positions_S = positions_of(spans, table)
        k_SKD, v_SKV = paged_rows(pages_k, table, positions_S), paged_rows(pages_v, table, positions_S)
        outs.append(in_tiles(q_THD[row : row + count], k_SKD, v_SKV, spans, first, scale, reach))
    return torch.cat(outs)


def write_codes(pages: Tensor, slots_T: Tensor, entry: Tensor) -> Tensor:
    """`write_pages` into pages [P, B, ..., bytes] of 8-bit codes with scales (`coded_pages.encode`)."""
    return write_pages(pages, slots_T, coded_pages.encode(entry))


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
    """`paged_attention` over coded pages [P, B, K, bytes]: as over pages that hold, in the dtype of q, the numbers they stand for.

    Entries of both are D channels wide, of which the first `values` are an entry's value (latent attention: less than D).
    """
    k, v = (coded_pages.decode(pages, q_THD.shape[-1], q_THD.dtype) for pages in (pages_k, pages_v))
    return paged_attention(q_THD, k, v[..., :values], chunks_C4, tables, scale, reach, count_1)


def by_head(x_THA: Tensor, weight_HAB: Tensor) -> Tensor:
    """Each head's part of a token times the head's own matrix. Result [T, H, B]."""
    return torch.einsum("tha,hab->thb", x_THA, weight_HAB)


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in float32 and experts int64 [T, K] of each token; the bias steers the choice, never the weights."""
    return routed(affinity(logits_TE, rule), bias_E, rule)


def tile_gqa(q_NMHD: Tensor, pages_k: Tensor, pages_v: Tensor, slots_NS: Tensor, seen_NMS: Tensor, scale: float) -> Tensor:
    """Attention of N tiles of M queries each, every tile over S entries of its own, from anywhere in the pages.

    pages_k, pages_v: [P, B, K, D]; slots_NS: int64, page * B + place in the page; seen_NMS: bool, may this query see that
    entry; every query sees one at least. Result [N, M, H, D] in the dtype of q.
    """
    outs = []
    for q_MHD, slots_S, seen_MS in zip(q_NMHD, slots_NS, seen_NMS, strict=True):
        k_SKD, v_SKD = (pages.flatten(0, 1)[slots_S].to(q_MHD.dtype) for pages in (pages_k, pages_v))
        outs.append(attention(q_MHD, k_SKD, v_SKD, seen_MS, scale))
    return torch.stack(outs)


def tile_mla(q_NMHE: Tensor, pages: Tensor, slots_NS: Tensor, seen_NMS: Tensor, scale: float, latent: int) -> Tensor:
    """`tile_gqa` for absorbed latent attention: pages [P, B, E], an entry being a latent of width `latent` and the rotated key.

    q_NMHE: queries against latents, followed by their rotated part. Result [N, M, H, latent] in the dtype of q.
    """
    return tile_gqa(q_NMHE, pages[:, :, None], pages[:, :, None], slots_NS, seen_NMS, scale)[..., :latent]


def sees_all(reach: Reach, tokens: int) -> bool:
    """Does every token of a document so long see everything before it?"""
    return reach.pairs(tokens) == tokens * (tokens + 1) // 2


def in_tiles(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, spans: list[Span], first: int, scale: float, reach: Reach) -> Tensor:
    """Queries from position `first` on, a tile at a time over the keys in its reach. Keys and values are of the positions `spans`.

    The beginning of a document, where everything before is seen, is one tile that needs no mask.
    """
    last, outs = first + len(q_THD), []
    if first == 0:
        first = bisect_left(range(1, last + 1), True, key=lambda tokens: not sees_all(reach, tokens))
        outs.append(rows_gqa(q_THD[None, :first], k_SKD[None, :first], v_SKV[None, :first], None, scale)[0])
        q_THD = q_THD[first:]
    if first == last:
        return outs[0]
    seen = sum(stop - start for start, stop in reach.spans(last - 1, last))
    size = QUERIES if seen >= 4 * QUERIES else max(1, QUERIES // 3)
    shared = q_THD.shape[1] // k_SKD.shape[1]
    for tile in range(first - first % size, last, size):
        start, stop = max(tile, first), min(tile + size, last)
        near = reach.spans(start, stop)
        k, v = _cut(k_SKD, spans, near), _cut(v_SKV, spans, near)
        outs.append(_folded(q_THD[start - first : stop - first], k, v, _mask(reach, start, stop, shared, q_THD), scale))
    return torch.cat(outs)


def sample(logits_RV: Tensor, choices_R5: Tensor) -> Tensor:
    """int64 [R]: a token for each row of float32 logits, by its row of float64 choices (see `sampling.COLUMNS`)."""
    return torch.stack([chosen(logits_V, *choice) for logits_V, choice in zip(logits_RV, choices_R5.tolist(), strict=True)])


def _mask(reach: Reach, start: int, stop: int, shared: int, like: Tensor) -> Tensor | None:
    """0 where a query sees a key of its tile's spans and -inf elsewhere; each query's row `shared` times over.

    None when all is seen: the spans of a single query hold nothing but what it sees. Beyond its first tokens a window
    looks the same wherever it stands, so all tiles share the mask of the first such tile.
    """
    if stop - start == 1:
        return None
    beyond = max(0, start - reach.window + 1 - reach.global_tokens) if isinstance(reach, Window) else 0
    return _made_mask(reach, start - beyond, stop - beyond, shared, like.dtype, like.device)


@lru_cache(maxsize=8)
def _made_mask(reach: Reach, start: int, stop: int, shared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be made while scoring and used while training
        keys_S = positions_of(reach.spans(start, stop), torch.empty(0, device=device))
        seen_TS = reach.visible(torch.arange(start, stop, device=device)[:, None], keys_S[None])
        mask_TS = torch.zeros(seen_TS.shape, dtype=dtype, device=device).masked_fill(~seen_TS, -torch.inf)
        return mask_TS.repeat_interleave(shared, 0)


def positions_of(spans: list[Span], like: Tensor) -> Tensor:
    """All positions of the spans, on the device of `like`."""
    return torch.cat([torch.arange(start, stop, device=like.device) for start, stop in spans])


def _cut(x_S: Tensor, held: list[Span], wanted: list[Span]) -> Tensor:
    """The entries of the wanted spans, out of those of the held ones, which contain them. One span is not copied."""
    parts, offset, left = [], 0, iter(held)
    low, high = next(left)
    for start, stop in wanted:
        while stop > high:
            offset += high - low
            low, high = next(left)
        parts.append(x_S[offset + start - low : offset + stop - low])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _as_wide(values: Tensor, queries: Tensor) -> Tensor:
    """Values filled up with zeros to the width of the queries: three times faster than unequal widths, which PyTorch can't fuse."""
    missing = queries.shape[-1] - values.shape[-1]
    return F.pad(values, (0, missing)) if missing > 0 else values
