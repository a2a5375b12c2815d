"""Documents packed in one row are each alone; latents may be expanded or absorbed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import Theirs, agree, logits_of, prompt

from lineshaft.model.attend import LatentQuery, PackedCausal, Reach
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Int8

FAMILIES = ["deepseek", "llama", "mistral-window", "qwen3"]


@pytest.fixture(scope="module")
def models(theirs: Callable[[str], Theirs]) -> dict[str, Decoder]:
    return {name: load_checkpoint(theirs(name).folder) for name in FAMILIES}


def packed(model: Decoder, documents: list[list[int]], row: int | None = None) -> Tensor:
    lengths = [len(document) for document in documents]
    starts = [0, *accumulate(lengths)][:-1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.tensor([token for document in documents for token in document])
    with torch.inference_mode():
        return model(tokens, positions, PackedCausal(starts, len(tokens), row))


def texts(lengths: list[int]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
@example(lengths=[1])
@example(lengths=[1, 1, 1])
def test_a_packed_document_is_as_it_is_alone(name: str, models: dict[str, Decoder], lengths: list[int]) -> None:
    documents = texts(lengths)
    alone = torch.cat([logits_of(models[name], document) for document in documents])
    assert agree(packed(models[name], documents), alone)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4))
def test_rows_of_documents_are_as_they_are_alone(name: str, models: dict[str, Decoder], rows: list[list[int]]) -> None:
    row = max(sum(lengths) for lengths in rows)
    documents = texts([length for lengths in rows for length in [*lengths, *([row - sum(lengths)] if sum(lengths) < row else [])]])
    alone = torch.cat([logits_of(models[name], document) for document in documents])
    assert agree(packed(models[name], documents, row), alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_run_after_its_past_is_as_in_the_whole(name: str, models: dict[str, Decoder]) -> None:
    text = prompt(12)
    one_by_one = torch.cat([logits_of(models[name], text[: end + 1])[-1:] for end in range(len(text))])
    assert agree(logits_of(models[name], text), one_by_one)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_before_a_changed_token_moves_by_a_bit(name: str, models: dict[str, Decoder]) -> None:
    """The routed experts' runs keep their lengths only where the routing does, so a dense layer is asked for the very bits."""
    documents = texts([9, 14, 9])
    before = packed(models[name], documents)
    documents[1][5] = (documents[1][5] + 1) % 61
    after = packed(models[name], documents)
    others = [*range(14), *range(23, 32)]
    assert agree(before[others], after[others], 1e-6)
    if name != "deepseek":
        assert torch.equal(before[others], after[others])
    assert not agree(before[14:23], after[14:23], 1e-3)


def test_attention_itself_moves_by_no_bit_when_the_future_or_another_document_changes() -> None:
    q, k, v = (torch.randn(24, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    run = PackedCausal([0, 10], 24)
    before = run.gqa(0, q, k[:, :2], v[:, :2], Reach(0.3))
    k[15:], v[15:] = 5.0, -5.0
    assert torch.equal(before[:15], run.gqa(0, q, k[:, :2], v[:, :2], Reach(0.3))[:15])
    k[:10], v[:10] = 7.0, -7.0
    assert torch.equal(before[10:15], run.gqa(0, q, k[:, :2], v[:, :2], Reach(0.3))[10:15])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_is_softmax_over_what_may_be_seen(window: int | None) -> None:
    """Written out in float64, token by token."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(11, heads, 6, generator=generator) for heads in (4, 2, 2))
    starts = [0, 4, 5]
    got = PackedCausal(starts, 11).gqa(0, q, k, v, Reach(0.7, window))
    for token in range(11):
        first = max(start for start in starts if start <= token)
        first = first if window is None else max(first, token - window + 1)
        for head in range(4):
            scores = 0.7 * k[first : token + 1, head // 2].double() @ q[token, head].double()
            expected = scores.softmax(0) @ v[first : token + 1, head // 2].double()
            assert agree(got[token, head].double(), expected)


@pytest.mark.parametrize(("starts", "tokens", "row"), [([0, 3], 8, 4), ([1], 4, None), ([0], 8, 4), ([], 4, None), ([0], 7, 4)])
def test_documents_that_do_not_fit_the_rows_are_refused(starts: list[int], tokens: int, row: int | None) -> None:
    with pytest.raises(ValueError, match="row"):
        PackedCausal(starts, tokens, row)


@pytest.mark.parametrize("fmt", [None, Int8(), Int8(4)])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    context=st.integers(1, 30),
    new=st.integers(1, 5),
    widths=st.sampled_from([(4, 6, 8), (8, 2, 4), (1, 2, 3)]),
)
def test_absorbed_latents_give_what_expanded_ones_give(
    fmt: Int8 | None, seed: int, context: int, new: int, widths: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (nope, rope, value), heads, latent = widths, 3, 12
    up = Linear(latent, heads * (nope + value)).requires_grad_(False)
    up.weight.normal_(generator=generator)
    if fmt is not None:
        up.recode(fmt)
    query = LatentQuery(torch.randn(new, heads, nope, generator=generator), torch.randn(new, heads, rope, generator=generator), up)
    latents, rotated = torch.randn(context, latent, generator=generator), torch.randn(context, rope, generator=generator)

    keys, values = query.expand(latents)
    scores = torch.einsum("thn,shn->hts", query.nope_THN, keys) + torch.einsum("thr,sr->hts", query.rope_THR, rotated)
    expanded = torch.einsum("hts,shv->thv", (scores * 0.2).softmax(-1), values)

    queries, up_value = query.absorb()
    scores = torch.einsum("thc,sc->hts", queries, latents) + torch.einsum("thr,sr->hts", query.rope_THR, rotated)
    absorbed = torch.einsum("thc,hvc->thv", torch.einsum("hts,sc->thc", (scores * 0.2).softmax(-1), latents), up_value)
    assert agree(absorbed, expanded)
