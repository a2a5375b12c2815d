"""Attention over pages, fed in chunks of any size, is the attention over whole documents, for every kind of reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import KINDS, dense, mask_of, reaches
from torch import Tensor

from lineshaft.engine.attend import PagedAttend
from lineshaft.engine.cache import PagedCache
from lineshaft.model import attend
from lineshaft.model.attend import IndexQuery, LatentQuery, PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops import reference
from lineshaft.ops.reach import Causal, Reach, Window
from lineshaft.sched.plan import Chunk, Plan

Tiny = Callable[..., Decoder]
Layer = Callable[[PagedAttend, list[slice]], Tensor]
"""Runs one layer for these rows of each document."""
HEADS, KV, WIDTH = 4, 2, 8
LATENT, NOPE, ROPE, VALUE, INDEX = 16, 8, 4, 6, 8


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Tiles that end inside chunks, though the texts are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "SCORED", 3)
        patch.setattr(reference, "QUERIES", 3)
        yield


def in_chunks(cache: PagedCache, lengths: list[int], cuts: st.DataObject, layer: Layer) -> list[Tensor]:
    """Each document's output, from steps that take a few tokens of each; pages lie anywhere, in any order."""
    pages = torch.randperm(cache.pages[0], generator=torch.Generator().manual_seed(1)).tolist()
    requests = [SimpleNamespace(tables=[[pages.pop() for _ in range(-(-length // cache.page_tokens))]]) for length in lengths]
    done, outs = [0] * len(lengths), [[] for _ in lengths]
    while done != lengths:
        sizes = [cuts.draw(st.integers(1, 9)) if at < length else 0 for at, length in zip(done, lengths, strict=True)]
        stops = [min(at + size, length) for at, size, length in zip(done, sizes, lengths, strict=True)]
        rows = [slice(at, stop) for at, stop in zip(done, stops, strict=True)]
        plan = Plan([Chunk(request, own.start, own.stop) for request, own in zip(requests, rows, strict=True) if own.start < own.stop])
        parts = layer(PagedAttend(cache, plan), rows).split([own.stop - own.start for own in rows])
        for out, part in zip(outs, parts, strict=True):
            out.append(part)
        done = stops
    return [torch.cat(out) for out in outs]


def row_of(documents: list[Tensor], rows: list[slice]) -> Tensor:
    return torch.cat([document[own] for document, own in zip(documents, rows, strict=True)])


def randoms(lengths: list[int], seed: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, *shape, generator=generator) for length in lengths]


class Latents:
    """What latent attention needs for each of some documents."""

    def __init__(self, lengths: list[int], seed: int, top_k: int | None) -> None:
        self.nope, self.rope = randoms(lengths, seed, HEADS, NOPE), randoms(lengths, seed + 1, HEADS, ROPE)
        self.latent, self.rotated = randoms(lengths, seed + 2, LATENT), randoms(lengths, seed + 3, ROPE)
        self.index_q, self.weight = randoms(lengths, seed + 4, 5, INDEX), randoms(lengths, seed + 5, 5)
        self.key, self.top_k = randoms(lengths, seed + 6, INDEX), top_k
        self.up = Linear(LATENT, HEADS * (NOPE + VALUE)).requires_grad_(False)
        self.up.weight.normal_(generator=torch.Generator().manual_seed(seed))

    def run(self, attend: PagedAttend | PackedCausal, rows: list[slice], reach: Reach) -> Tensor:
        of = [row_of(part, rows) for part in (self.index_q, self.weight, self.key)]
        index = None if self.top_k is None else IndexQuery(*of, self.top_k)
        query = LatentQuery(row_of(self.nope, rows), row_of(self.rope, rows), self.up)
        return attend.mla(0, query, row_of(self.latent, rows), row_of(self.rotated, rows), 0.3, reach, index)

    def plain(self, reach: Reach) -> list[Tensor]:
        """Each document alone, with expanded keys and values."""
        sizes = [len(part) for part in self.latent]
        outs = []
        for number, size in enumerate(sizes):
            rows = [slice(0, size if other == number else 0) for other in range(len(sizes))]
            outs.append(self.run(PackedCausal([0], size), rows, reach))
        return outs


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=40)
@given(reach=reaches(), lengths=LENGTHS, page=st.integers(1, 7), seed=st.integers(0, 10**6), cuts=st.data())
def test_grouped_attention_is_dense_attention_under_the_mask(
    tiny: Tiny, reach: Reach, lengths: list[int], page: int, seed: int, cuts: st.DataObject
) -> None:
    q, k, v = randoms(lengths, seed, HEADS, WIDTH), randoms(lengths, seed + 1, KV, WIDTH), randoms(lengths, seed + 2, KV, WIDTH)
    cache = PagedCache(tiny("mistral").config, [130], page, torch.float32)

    def layer(paged: PagedAttend, rows: list[slice]) -> Tensor:
        return paged.gqa(0, row_of(q, rows), row_of(k, rows), row_of(v, rows), 0.4, reach)

    for number, got in enumerate(in_chunks(cache, lengths, cuts, layer)):
        expected = dense(q[number], k[number], v[number], mask_of(reach, lengths[number]), 0.4)
        assert (got.double() - expected).abs().max() <= 1e-6 * max(1, v[number].abs().max())


@pytest.mark.parametrize("top_k", [None, 5])
@settings(max_examples=25)
@given(reach=reaches(), lengths=LENGTHS, page=st.integers(1, 7), seed=st.integers(0, 10**6), cuts=st.data())
def test_absorbed_latents_in_chunks_are_expanded_ones_in_one_go(
    tiny: Tiny, top_k: int | None, reach: Reach, lengths: list[int], page: int, seed: int, cuts: st.DataObject
) -> None:
    latents = Latents(lengths, seed, top_k)
    cache = PagedCache(tiny("deepseek_v32" if top_k else "deepseek_v3").config, [130], page, torch.float32)
    absorbed = in_chunks(cache, lengths, cuts, lambda paged, rows: latents.run(paged, rows, reach))
    for got, expected in zip(absorbed, latents.plain(reach), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("reach", KINDS.values(), ids=KINDS)
def test_no_token_of_a_chunk_sees_a_later_one(tiny: Tiny, reach: Reach) -> None:
    """By no bit; but where the indexer chooses, the later token moves the size of the products, and so the last bits."""
    for top_k, kind in ((None, "deepseek_v3"), (4, "deepseek_v32")):
        before, after = Latents([20], 0, top_k), Latents([20], 0, top_k)
        for part in (after.latent, after.rotated, after.key, after.index_q):
            part[0][12:] *= -3
        one, other = (
            latents.run(PagedAttend(PagedCache(tiny(kind).config, [8], 3, torch.float32), plan_of(20, 3)), [slice(0, 20)], reach)
            for latents in (before, after)
        )
        assert (one[:12] - other[:12]).abs().max() <= (0 if top_k is None else 1e-5)
        assert (one[12:] - other[12:]).abs().min(0).values.max() > 1e-2
    q, k, v = randoms([20], 0, HEADS, WIDTH)[0], randoms([20], 1, KV, WIDTH)[0], randoms([20], 2, KV, WIDTH)[0]
    cache = PagedCache(tiny("mistral").config, [8], 3, torch.float32)
    one = PagedAttend(cache, plan_of(20, 3)).gqa(0, q, k, v, 0.4, reach)
    k[12:], v[12:] = 5.0, -5.0
    assert torch.equal(PagedAttend(cache, plan_of(20, 3)).gqa(0, q, k, v, 0.4, reach)[:12], one[:12])


def plan_of(last: int, page: int, first: int = 0) -> Plan:
    return Plan([Chunk(SimpleNamespace(tables=[list(range(-(-last // page)))]), first, last)])


@pytest.mark.parametrize("context", [100, 900])
def test_a_decoding_step_reads_what_its_reach_holds_however_long_the_context(
    tiny: Tiny, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    rows = reference.paged_rows
    monkeypatch.setattr(reference, "paged_rows", lambda pages, table, places: read.append(len(places)) or rows(pages, table, places))
    cache = PagedCache(tiny("mistral").config, [60], 16, torch.float32)
    step = PagedAttend(cache, plan_of(context, 16, context - 1))
    q, k, v = randoms([1], 0, HEADS, WIDTH)[0], randoms([1], 1, KV, WIDTH)[0], randoms([1], 2, KV, WIDTH)[0]
    for reach, size in ((Window(window=9, global_tokens=3), 12), (Window(window=9), 9), (Causal(), context)):
        step.gqa(0, q, k, v, 1.0, reach)
        assert read == [size, size]
        read.clear()
    latents = Latents([1], 0, 7)
    cache = PagedCache(tiny("deepseek_v32").config, [60], 16, torch.float32)
    latents.run(PagedAttend(cache, plan_of(context, 16, context - 1)), [slice(0, 1)], Causal())
    assert read == [7]  # of the latents; every index key is read, through the table
