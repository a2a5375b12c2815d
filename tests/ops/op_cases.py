"""Arguments of every op, drawn at random, and when two results are as good as equal."""

from __future__ import annotations

import indexer_cases
import native_cases
import sample_cases
import torch
from expert_cases import ExpertShapes
from hypothesis import strategies as st
from integer_cases import integers
from masks import reaches
from torch import Tensor

from lineshaft.ops import coded_pages
from lineshaft.ops.entries import entry_bytes
from lineshaft.ops.formats import Fp8Block
from lineshaft.ops.neighbours import MOST, Neighbours
from lineshaft.ops.steady import KEYS

Arguments = tuple[object, ...]
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [2, 6, 16, 32, 64, 66, 100, 128, 130]
"""Of coded entries: around whole vectors and groups."""
INPUT_SCALES = st.sampled_from([0.0, 0.005, 0.02, 0.7])
"""Of activations in 8 bits: each token's own; one that cuts many numbers off, few, and none."""


class Shapes(ExpertShapes):
    """Draws the arguments of each op: odd widths, one row or none, pages half full."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def size(self, most: int) -> int:
        return int(self.draw(st.integers(1, most)))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def sample(self) -> Arguments:
        return tuple(self.draw(sample_cases.choices()))

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
        return x, *weight, self.draw(INPUT_SCALES)

    def linear_fp8(self) -> Arguments:
        block, outputs, inputs = (self.size(9), self.size(9)), self.size(19), self.size(33)
        stored = Fp8Block(block).encode(self.randn(outputs, inputs, dtype=torch.float32))
        bias = self.randn(outputs) if self.draw(st.booleans()) else None
        return self.randn(self.size(7), inputs), stored["weight"], stored["weight_scale_inv"], block, bias

    def rms_norm(self) -> Arguments:
        tokens, heads, width = self.draw(st.integers(0, 20)), self.draw(st.sampled_from([None, 1, 3])), self.size(40)
        x = self.strided(tokens, (heads or 1) * width).mul_(self.draw(st.sampled_from([1e-3, 1, 100])))
        return x.unflatten(1, (heads, width)) if heads else x, self.randn(width), 1e-6

    def layer_norm(self) -> Arguments:
        tokens, width = self.draw(st.integers(0, 20)), self.size(70)
        shift = self.draw(st.sampled_from([0, 30]))  # a mean that is large beside the differences
        return self.strided(tokens, width) + shift, self.randn(width), self.randn(width), 1e-6

    def choose_keys(self) -> Arguments:
        return tuple(self.draw(indexer_cases.choices(self.dtype)))

    def rope(self) -> Arguments:
        tokens, heads, half = self.draw(st.integers(0, 6)), self.size(5), self.draw(st.integers(1, 9) | st.sampled_from([16, 32]))
        angles = self.randn(tokens, half, dtype=torch.float32) * 10
        return self.strided(tokens, heads * 2 * half).unflatten(1, (heads, 2 * half)), angles.cos(), angles.sin(), self.draw(st.booleans())

    def silu_mul(self) -> Arguments:
        shape = self.draw(st.integers(0, 6)), self.size(33)
        return self.strided(*shape).mul_(3), self.strided(*shape)

    def add(self) -> Arguments:
        shape = self.draw(st.integers(0, 6)), self.size(33)
        return self.strided(*shape), self.strided(*shape)

    def embed(self) -> Arguments:
        weight = self.randn(self.size(20), self.size(33))
        return torch.randint(len(weight), (self.draw(st.integers(0, 6)),), generator=self.generator), weight

    def angles(self) -> Arguments:
        tokens, pairs = self.draw(st.integers(0, 6)), self.size(9)
        speed = torch.rand(*self.draw(st.sampled_from([(pairs,), (tokens, pairs)])), generator=self.generator)
        return torch.randint(3000, (tokens,), generator=self.generator), speed, self.draw(st.sampled_from([1.0, 1.3]))

    def write_pages(self) -> Arguments:
        page, pages, tokens = self.size(5), self.size(4), self.draw(st.integers(0, 4))
        slots = torch.randperm(page * pages, generator=self.generator)[:tokens]
        entry = self.size(3), self.size(9)
        return self.randn(pages, page, *entry), slots, self.strided(len(slots), entry[0] * entry[1]).unflatten(1, entry)

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

    def packed_linear(self) -> Arguments:
        kind = self.draw(st.sampled_from(["dense", "int8", "int4", "float8"]))
        shape, packed = self.draw(native_cases.weights(kind, self.dtype))
        x = self.strided(self.draw(st.integers(0, 14)), shape.inputs)
        x[:1] *= self.draw(st.sampled_from([0, 1, 1e-30, 1e4]))
        bias = self.randn(shape.outputs, dtype=torch.float32) if self.draw(st.booleans()) else None
        whole, wide = kind.startswith("int") and self.draw(st.booleans()), self.draw(st.booleans())
        kept = torch.float32 if wide else self.dtype
        added = self.strided(len(x), shape.outputs).to(kept) if self.draw(st.booleans()) else None
        return x, packed, shape, bias, whole, wide, self.draw(INPUT_SCALES) if whole else 0.0, added

    def packed_linears(self) -> Arguments:
        return self._neighbours([self.draw(st.integers(1, 150)) for _ in range(self.size(MOST))])

    def packed_swiglu(self) -> Arguments:
        return self._neighbours([self.draw(st.integers(1, 150))] * 2)

    def _neighbours(self, outputs: list[int]) -> Arguments:
        kind = self.draw(st.sampled_from(["dense", "int8", "int4", "float8"]))
        shapes, packed = zip(*self.draw(native_cases.neighbours(kind, self.dtype, outputs)), strict=True)
        biases = tuple(self.randn(count, dtype=torch.float32) if self.draw(st.booleans()) else None for count in outputs)
        whole = kind.startswith("int") and self.draw(st.booleans())
        scale = self.draw(INPUT_SCALES) if whole else 0.0
        return self.strided(self.draw(st.integers(0, 14)), shapes[0].inputs), Neighbours(packed, shapes, biases, whole, scale)

    def paged_attention(self) -> Arguments:
        heads, kv, width, values = self._heads()
        kv, values = self.draw(st.sampled_from([(kv, values), (1, -width // 2)]))  # negative: within its keys, as latent attention
        world = self.draw(native_cases.worlds())
        keys = self.randn(world.pages, world.page_tokens, kv, width)
        pages_v = keys[..., :-values] if values < 0 else self.randn(*keys.shape[:3], values)
        q = self.strided(world.tokens, heads * width).unflatten(1, (heads, width))
        return q, keys, pages_v, world.chunks, world.tables, width**-0.5, world.reach

    def write_codes(self) -> Arguments:
        page, pages, tokens = self.size(5), self.size(4), self.draw(st.integers(0, 4))
        slots, heads = torch.randperm(page * pages, generator=self.generator)[:tokens], self.draw(st.sampled_from([None, 1, 3]))
        width = self.draw(st.sampled_from(WIDTHS) | st.integers(1, 40))
        entry = self.strided(len(slots), (heads or 1) * width).mul_(self.draw(st.sampled_from([0, 1, 1e-30, 1e4])))
        before = torch.randint(256, (pages, page, *([heads] if heads else []), entry_bytes(width)), generator=self.generator)
        return before.to(torch.uint8), slots, entry.unflatten(1, (heads, width)) if heads else entry

    def coded_attention(self) -> Arguments:
        kv, width = self.size(2), self.draw(st.sampled_from(WIDTHS))
        heads, latent = kv * self.size(3), self.draw(st.sampled_from([0, 0, self.size(width)]))  # values within the keys, or as wide
        world = self.draw(native_cases.worlds())
        keys, values = (coded_pages.encode(self.randn(world.pages, world.page_tokens, kv, width)) for _ in range(2))
        q = self.strided(world.tokens, heads * width).unflatten(1, (heads, width))
        pages_v, shown = (keys, latent) if latent else (values, width)
        return q, keys, pages_v, shown, world.chunks, world.tables, width**-0.5, world.reach

    def strided(self, rows: int, width: int) -> Tensor:
        """Numbers of a tensor of their own, of some columns of a wider one, or of every other column or row."""
        start, row, column = self.draw(st.sampled_from([(0, 1, 1), (1, 1, 1), (3, 2, 1), (1, 1, 2)]))
        wide = self.randn(rows * row, start + width * column)
        return wide[::row, start::column] if start else wide


@st.composite
def arguments(draw: st.DrawFn, op: str, dtype: torch.dtype) -> Arguments:
    return getattr(Shapes(draw, dtype), op)()


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = max([1.0, *expected.abs().flatten().tolist()])
    return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)
