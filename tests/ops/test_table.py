"""Every kernel in the tables against its reference on random shapes, and every reference against arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable

import expert_cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_cases import exact_linear_int, exact_linear_int_a8, integers
from masks import KINDS, dense, mask_of, reaches
from torch import Tensor

from lineshaft.ops import reference, table
from lineshaft.ops.formats import Fp8Block
from lineshaft.ops.reach import Causal, Reach
from lineshaft.ops.steady import KEYS

Arguments = tuple[object, ...]
DTYPES = [torch.float32, torch.bfloat16]


class Shapes(expert_cases.ExpertShapes):
    """Draws the arguments of each op: odd widths, one row, pages half full."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def size(self, most: int) -> int:
        return int(self.draw(st.integers(1, most)))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def linear(self) -> Arguments:
        tokens, inputs, outputs = self.size(7), self.size(33), self.size(19)
        bias = self.randn(outputs) if self.draw(st.booleans()) else None
        return self.randn(tokens, inputs), self.randn(outputs, inputs), bias

    def linear_int(self) -> Arguments:
        fmt, inputs = self.draw(integers()), 64 * self.size(3)
        stored = fmt.encode(self.randn(self.size(19), inputs, dtype=torch.float32))
        scale = stored["weight_scale"].to(self.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])))
        codes, zero = stored["weight" if fmt.packing == "int-quantized" else "weight_packed"], stored.get("weight_zero_point")
        bias = self.randn(len(scale)) if self.draw(st.booleans()) else None
        return self.randn(self.size(7), inputs), codes, scale, zero, fmt.bits, bias

    def linear_int_a8(self) -> Arguments:
        x, *weight = self.linear_int()
        x[-1] *= self.draw(st.sampled_from([0, 1, 1e-30, 1e4]))
        return x, *weight

    def linear_fp8(self) -> Arguments:
        block, outputs, inputs = (self.size(9), self.size(9)), self.size(19), self.size(33)
        stored = Fp8Block(block).encode(self.randn(outputs, inputs, dtype=torch.float32))
        bias = self.randn(outputs) if self.draw(st.booleans()) else None
        return self.randn(self.size(7), inputs), stored["weight"], stored["weight_scale_inv"], block, bias

    def rms_norm(self) -> Arguments:
        lead, width = [self.size(5) for _ in range(self.draw(st.integers(1, 2)))], self.size(40)
        return self.randn(*lead, width) * self.draw(st.sampled_from([1e-3, 1, 100])), self.randn(width), 1e-6

    def rope(self) -> Arguments:
        tokens, heads, half = self.size(6), self.size(5), self.size(9)
        angles = self.randn(tokens, half, dtype=torch.float32) * 10
        return self.randn(tokens, heads, 2 * half), angles.cos(), angles.sin(), self.draw(st.booleans())

    def silu_mul(self) -> Arguments:
        shape = self.size(6), self.size(33)
        return self.randn(*shape) * 3, self.randn(*shape)

    def _paged(self) -> tuple[int, int, Tensor, int, int]:
        """Page size, pages, the request's table, its first new position, its new tokens."""
        page, tokens, first = self.size(5), self.size(4), self.draw(st.integers(0, 20))
        need = -(-(first + tokens) // page)
        pages = need + self.size(3)
        return page, pages, torch.randperm(pages, generator=self.generator)[:need], first, tokens

    def _heads(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, key width, value width: as wide, narrower and, rarely, wider."""
        kv, width = self.size(3), 2 * self.size(8)
        return kv * self.size(3), kv, width, self.draw(st.sampled_from([width, width // 2, width + 1]))

    def _dense(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv, width, values = self._heads()
        return self.randn(queries, heads, width), self.randn(keys, kv, width), self.randn(keys, kv, values)

    def _any_mask(self, *shape: int) -> Tensor:
        mask = torch.rand(shape, generator=self.generator) < 0.5
        mask[..., 0] = True  # softmax over nothing has no value
        return mask

    def rows_gqa(self) -> Arguments:
        rows, size = self.size(3), self.size(9)
        q, k, v = (x.view(rows, size, *x.shape[1:]) for x in self._dense(rows * size, rows * size))
        return q, k, v, self.draw(st.sampled_from([None, self._any_mask(rows, size, size)])), q.shape[-1] ** -0.5

    def attention(self) -> Arguments:
        tokens, keys = self.size(6), self.size(12)
        mask = self.draw(st.sampled_from([None, self._any_mask(tokens, keys)]))
        return *self._dense(tokens, keys), mask, 0.3

    def reach_gqa(self) -> Arguments:
        keys = self.size(90)
        return *self._dense(self.draw(st.sampled_from([1, keys, (keys + 1) // 2])), keys), 0.3, self.draw(reaches())

    def paged_rows(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        wanted = torch.randint(first + tokens, (self.size(9),), generator=self.generator)
        return self.randn(pages, page, *[self.size(3) for _ in range(self.draw(st.integers(1, 2)))]), places, wanted

    def paged_gqa(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        heads, kv, width, _ = self._heads()
        keys, values = self.randn(pages, page, kv, width), self.randn(pages, page, kv, width)
        return self.randn(tokens, heads, width), keys, values, places, first, width**-0.5, self.draw(reaches())

    def _latents(self, page: int, pages: int, tokens: int) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
        heads, latent, rotary = self.size(4), self.size(17), 2 * self.size(4)
        queries = self.randn(tokens, heads, latent), self.randn(tokens, heads, rotary)
        return (*queries, self.randn(pages, page, latent + rotary)), (latent + rotary) ** -0.5

    def paged_mla(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        tensors, scale = self._latents(page, pages, tokens)
        return *tensors, places, first, scale, self.draw(reaches())

    def paged_chosen_mla(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        tensors, scale = self._latents(page, pages, tokens)
        return *tensors, places, self._any_mask(tokens, first + tokens), scale

    def sigmoid(self) -> Arguments:
        return (self.randn(self.size(6), self.size(70)) * 3,)

    def by_head(self) -> Arguments:
        tokens, heads, inner, outer = (self.size(9) for _ in range(4))
        return self.randn(tokens, heads, inner), self.randn(heads, inner, outer)

    def _tiles(self) -> tuple[int, int, int, int, Tensor, Tensor]:
        """Page size, pages, tiles, queries, slots and what is seen."""
        page, pages, tiles, queries, keys = self.size(5), self.size(9), self.size(3), self.size(5), KEYS * self.size(2)
        slots = torch.randint(page * pages, (tiles, keys), generator=self.generator)
        return page, pages, tiles, queries, slots, self._any_mask(tiles, queries, keys)

    def tile_gqa(self) -> Arguments:
        page, pages, tiles, queries, slots, seen = self._tiles()
        heads, kv, width, _ = self._heads()
        keys, values = self.randn(pages, page, kv, width), self.randn(pages, page, kv, width)
        return self.randn(tiles, queries, heads, width), keys, values, slots, seen, width**-0.5

    def tile_mla(self) -> Arguments:
        page, pages, tiles, queries, slots, seen = self._tiles()
        latent, rotary = self.size(17), 2 * self.size(4)
        q, entries = self.randn(tiles, queries, self.size(4), latent + rotary), self.randn(pages, page, latent + rotary)
        return q, entries, slots, seen, (latent + rotary) ** -0.5, latent


@st.composite
def arguments(draw: st.DrawFn, op: str, dtype: torch.dtype) -> Arguments:
    return getattr(Shapes(draw, dtype), op)()


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = max(1.0, expected.abs().max().item())
    return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


KERNELS = [
    pytest.param(
        device,
        op,
        marks=[] if device == "cpu" or torch.cuda.is_available() else pytest.mark.skip(reason=f"no {device} here"),
    )
    for device, kernels in table.BY_DEVICE.items()
    for op in kernels
]
KERNELS += [pytest.param("cpu, steady", op) for op in table.STEADY]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "op"), KERNELS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_kernel_does_what_its_reference_does(device: str, op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, dtype))
    place = device.partition(",")[0]
    there = tuple(item.to(place) if isinstance(item, Tensor) else item for item in given_)
    before = [item.clone() for item in there if isinstance(item, Tensor)]
    with table.steady(device != place):
        got, expected = expert_cases.as_one(getattr(table, op)(*there)), expert_cases.as_one(table.REFERENCE[op](*given_))
    assert got.dtype == expected.dtype
    assert op == "widen" or got.dtype == given_[0].dtype
    assert close(got.cpu(), expected, dtype)
    after = [item for item in there if isinstance(item, Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "it wrote into its arguments"


def test_every_op_can_be_called_and_every_device_has_every_op() -> None:
    for device, kernels in table.BY_DEVICE.items():
        assert kernels.keys() == table.REFERENCE.keys()
        assert table.chosen(device).keys() == table.REFERENCE.keys()
    assert all(callable(getattr(table, op)) and table.REFERENCE[op] is getattr(reference, op) for op in table.REFERENCE)
    assert set(table.chosen("cpu").values()) == {"reference", "cpu"}
    with table.steady():
        assert set(table.chosen("cpu").values()) == {"reference", "steady"}
    assert set(table.chosen("cpu").values()) == {"reference", "cpu"}


def test_an_unknown_device_runs_the_reference() -> None:
    assert table.kernel("linear", torch.empty(1, device="meta")) is reference.linear


# -- the references, in float64 and in other words ---------------------------------------------------------------


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


EXACT: dict[str, Callable[..., Tensor]] = {
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
    "sigmoid": exact_sigmoid,
    "by_head": exact_by_head,
    "tile_gqa": exact_tile_gqa,
    "tile_mla": exact_tile_mla,
    **expert_cases.EXACT,
}


@pytest.mark.parametrize("op", table.REFERENCE)
@settings(max_examples=25)
@given(data=st.data())
def test_every_reference_is_right(op: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    doubled = tuple(item.double() if isinstance(item, Tensor) and item.is_floating_point() else item for item in given_)
    assert close(expert_cases.as_one(table.REFERENCE[op](*given_)), expert_cases.as_one(EXACT[op](*doubled)), torch.float32)


def test_silu_is_torchs() -> None:
    gate = torch.linspace(-20, 20, 101)
    assert torch.equal(reference.silu_mul(gate, torch.ones(101)), F.silu(gate))


ATTENTION = ["reach_gqa", "paged_gqa", "paged_mla", "paged_chosen_mla"]


@pytest.mark.parametrize("tile", [1, 3, 16])
@pytest.mark.parametrize("op", ATTENTION)
@settings(max_examples=20)
@given(data=st.data())
def test_however_the_queries_are_cut_into_tiles_it_is_dense_attention_under_the_mask(op: str, tile: int, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERIES", tile)
        got = table.REFERENCE[op](*given_)
    assert (got.double() - EXACT[op](*given_)).abs().max() <= 1e-6 * max(1.0, got.abs().max().item())


@pytest.mark.parametrize("op", ["paged_gqa", "paged_mla", "paged_chosen_mla"])
@settings(max_examples=20)
@given(data=st.data())
def test_pages_out_of_reach_are_not_read(op: str, data: st.DataObject) -> None:
    """Entries outside the spans, or chosen by nobody, are not numbers: one that is only masked would spoil the result."""
    given_ = list(data.draw(arguments(op, torch.float32)))
    pages = {"paged_gqa": [1, 2]}.get(op, [2])
    places, tokens = given_[pages[-1] + 1], len(given_[0])
    if op == "paged_chosen_mla":
        used = given_[-2].any(0).nonzero()[:, 0].tolist()
    else:
        first = given_[pages[-1] + 2]
        used = [position for start, stop in given_[-1].spans(first, first + tokens) for position in range(start, stop)]
    before = table.REFERENCE[op](*given_)
    for index in pages:
        kept, size = given_[index], given_[index].shape[1]
        spoilt = torch.full_like(kept, torch.nan)
        for position in used:
            spoilt[places[position // size], position % size] = kept[places[position // size], position % size]
        given_[index] = spoilt
    assert torch.equal(table.REFERENCE[op](*given_), before)


@pytest.mark.parametrize("reach", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_dense_attention(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERIES", 4)
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(19, heads, width, generator=generator).requires_grad_() for heads, width in ((4, 6), (2, 6), (2, 4))]
    weight = torch.randn(19, 4, 4, generator=generator)
    got = torch.autograd.grad((reference.reach_gqa(*leaves, 0.4, reach) * weight).sum(), leaves)
    q, k, v = leaves
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.4
    weights = scores.masked_fill(~torch.from_numpy(mask_of(reach, 19)), -torch.inf).softmax(-1)
    expected = torch.autograd.grad((torch.einsum("hts,shv->thv", weights, v.repeat_interleave(2, 1)) * weight).sum(), leaves)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(got, expected, strict=True))
