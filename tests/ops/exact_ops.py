"""Every op in float64 and in other words than its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expert_cases
import indexer_cases
import native_cases
import numpy as np
import sample_cases
import torch
import torch.nn.functional as F
from integer_cases import exact_linear_int, exact_linear_int_a8, rounded_to_bytes
from masks import dense, mask_of
from torch import Tensor

from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.packing import Shape
from lineshaft.ops.reach import Causal, Reach


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.einsum("ti,oi->to", x, weight) + (0 if bias is None else bias)


def exact_linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, block: tuple[int, int], bias: Tensor | None) -> Tensor:
    rows, columns = (torch.arange(size) // each for size, each in zip(weight.shape, block, strict=True))
    return exact_linear(x, weight.double() * scale[rows][:, columns].double(), bias)


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As multiplication of complex numbers."""
    half, step = x.shape[-1] // 2, 2 if interleaved else 1
    first = [step * i for i in range(half)]
    second = [i + (1 if interleaved else half) for i in first]
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, None]
    out = torch.empty_like(x)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def exact_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def exact_add(x: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(np.add(x.numpy(), y.numpy()))


def exact_embed(tokens: Tensor, weight: Tensor) -> Tensor:
    return F.one_hot(tokens, len(weight)).double() @ weight


def exact_angles(positions: Tensor, speed: Tensor, length: float) -> Tensor:
    """The angle is rounded to float32, as transformers does; its cosine and sine are not."""
    turned = torch.polar(torch.tensor(length, dtype=torch.float64), (positions[:, None].float() * speed.float()).double())
    return torch.stack((turned.real, turned.imag))


def exact_write_pages(pages: Tensor, slots: Tensor, entry: Tensor) -> Tensor:
    written = pages.clone()
    for place, slot in enumerate(slots.tolist()):
        written[slot // pages.shape[1], slot % pages.shape[1]] = entry[place]
    return written


def exact_sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def exact_by_head(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([x[:, head] @ weight[head] for head in range(len(weight))], 1)


def exact_tile_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, slots: Tensor, seen: Tensor, scale: float) -> Tensor:
    page = pages_k.shape[1]
    keys = [[torch.stack([pages[slot // page, slot % page] for slot in own.tolist()]) for own in slots] for pages in (pages_k, pages_v)]
    return torch.stack([exact_attention(*tile, scale) for tile in zip(q, *keys, seen, strict=True)])


def exact_tile_mla(q: Tensor, pages: Tensor, slots: Tensor, seen: Tensor, scale: float, latent: int) -> Tensor:
    return exact_tile_gqa(q, pages[:, :, None], pages[:, :, None, :latent], slots, seen, scale)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    return dense(q, k, v, np.ones((len(q), len(k)), bool) if seen is None else seen.numpy(), scale)


def exact_rows_gqa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    masks = [torch.from_numpy(mask_of(Causal(), q.shape[1]))] * len(q) if seen is None else list(seen)
    return torch.stack([exact_attention(*row, scale) for row in zip(q, k, v, masks, strict=True)])


def exact_reach_gqa(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach) -> Tensor:
    return dense(q, k, v, mask_of(reach, len(k), len(k) - len(q)), scale)


def exact_paged_rows(pages: Tensor, places: Tensor, positions: Tensor) -> Tensor:
    page = pages.shape[1]
    return torch.stack([pages[places[p // page], p % page] for p in positions.tolist()])


def exact_paged_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, places: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    k, v = (exact_paged_rows(pages, places, torch.arange(first + len(q))) for pages in (pages_k, pages_v))
    return exact_reach_gqa(q, k, v, scale, reach)


def exact_paged_mla(q: Tensor, q_rope: Tensor, pages: Tensor, places: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """One key-value head whose value is the latent part of the key."""
    queries = torch.cat([q, q_rope], -1)
    return exact_paged_gqa(queries, pages[:, :, None], pages[:, :, None], places, first, scale, reach)[..., : q.shape[-1]]


def exact_paged_chosen_mla(q: Tensor, q_rope: Tensor, pages: Tensor, places: Tensor, chosen: Tensor, scale: float) -> Tensor:
    entries = exact_paged_rows(pages, places, torch.arange(chosen.shape[1]))[:, None]
    return dense(torch.cat([q, q_rope], -1), entries, entries[..., : q.shape[-1]], chosen.numpy(), scale)


def exact_packed_linear(
    x: Tensor, packed: Tensor, shape: Shape, bias: Tensor | None, whole: bool, _wide: bool, input_scale: float, added: Tensor | None
) -> Tensor:
    return exact_product(x, packed, shape, bias, whole, input_scale) + (0 if added is None else added)


def exact_product(x: Tensor, packed: Tensor, shape: Shape, bias: Tensor | None, whole: bool, input_scale: float) -> Tensor:
    codes, zero, scale = (torch.from_numpy(part) for part in native_cases.read(packed, shape))
    if not whole:
        return exact_linear(x, (codes - zero) * scale, bias)
    q, step = rounded_to_bytes(x, input_scale)
    return torch.einsum("ti,oi->to", q.double(), (codes - zero) * scale) * step + (0 if bias is None else bias)


def exact_packed_linears(x: Tensor, weights: Neighbours) -> tuple[Tensor, ...]:
    each = zip(weights.packed, weights.shapes, weights.biases, strict=True)
    return tuple(exact_product(x, packed, shape, bias, weights.whole, weights.input_scale) for packed, shape, bias in each)


def exact_packed_swiglu(x: Tensor, weights: Neighbours) -> Tensor:
    gate, up = exact_packed_linears(x, weights)
    return exact_silu_mul(gate, up)


def exact_paged_attention(
    q: Tensor, pages_k: Tensor, pages_v: Tensor, chunks: Tensor, tables: Tensor, scale: float, reach: Reach
) -> Tensor:
    outs = [q.new_empty(0, q.shape[1], pages_v.shape[3])]
    for row, first, count, start in chunks.tolist():
        places = tables[start:].long()
        outs.append(exact_paged_gqa(q[row : row + count], pages_k, pages_v, places, first, scale, reach))
    return torch.cat(outs)


def decoded(entries: Tensor, width: int) -> Tensor:
    """Byte by byte, a bf16 being the upper half of a float32."""
    raw = entries.numpy().astype(np.int64)
    codes, start = raw[..., :width], width + width % 2
    places = start + np.arange(width) // 64 * 2
    scale = ((raw[..., places] | raw[..., places + 1] << 8) << 16).astype(np.uint32).view(np.float32)
    return torch.from_numpy((codes - 256 * (codes > 127)) * scale.astype(float))


def exact_write_codes(pages: Tensor, slots: Tensor, entry: Tensor) -> Tensor:
    """A scale has 8 bits: of a number between 1/2 and 1, times a power of two, 256 times it is rounded up."""
    written = pages.clone()
    for slot, vectors in zip(slots.tolist(), entry.float().numpy(), strict=True):
        place = written[slot // pages.shape[1], slot % pages.shape[1]]
        for held, x in zip(place.view(-1, place.shape[-1]), np.atleast_2d(vectors), strict=True):
            scales = []
            for start in range(0, len(x), 64):
                part, power = np.frexp(np.abs(x[start : start + 64]).max() / np.float32(127))
                scales.append(np.ldexp(np.ceil(part * np.float32(256)), power - 8).astype(np.float32))
            each = np.repeat(scales, 64)[: len(x)]
            codes = np.rint(np.divide(x, each, out=np.zeros_like(x), where=each > 0)).astype(np.int8).tobytes()
            halves = (np.array(scales).view(np.uint32) >> 16).astype("<u2").tobytes()
            held[:] = torch.tensor(list(codes + bytes(len(x) % 2) + halves))
    return written


def exact_coded_attention(
    q: Tensor, pages_k: Tensor, pages_v: Tensor, values: int, chunks: Tensor, tables: Tensor, scale: float, reach: Reach
) -> Tensor:
    k, v = (decoded(pages, q.shape[-1]) for pages in (pages_k, pages_v))
    return exact_paged_attention(q, k, v[..., :values], chunks, tables, scale, reach)


EXACT: dict[str, Callable[..., Any]] = {
    **expert_cases.EXACT,
    **indexer_cases.EXACT,
    "linear": exact_linear,
    "linear_int": exact_linear_int,
    "linear_int_a8": exact_linear_int_a8,
    "linear_fp8": exact_linear_fp8,
    "rms_norm": exact_rms_norm,
    "rope": exact_rope,
    "silu_mul": exact_silu_mul,
    "rows_gqa": exact_rows_gqa,
    "attention": exact_attention,
    "reach_gqa": exact_reach_gqa,
    "paged_rows": exact_paged_rows,
    "paged_gqa": exact_paged_gqa,
    "paged_mla": exact_paged_mla,
    "paged_chosen_mla": exact_paged_chosen_mla,
    "add": exact_add,
    "embed": exact_embed,
    "angles": exact_angles,
    "write_pages": exact_write_pages,
    "sigmoid": exact_sigmoid,
    "by_head": exact_by_head,
    "tile_gqa": exact_tile_gqa,
    "tile_mla": exact_tile_mla,
    "packed_linear": exact_packed_linear,
    "packed_linears": exact_packed_linears,
    "packed_swiglu": exact_packed_swiglu,
    "paged_attention": exact_paged_attention,
    "write_codes": exact_write_codes,
    "coded_attention": exact_coded_attention,
    "sample": sample_cases.exact_sample,
}
