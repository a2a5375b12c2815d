"""Documents packed in one row are each alone, whatever their tokens see; latents may be expanded or absorbed.

Every kind of reach is checked against dense attention in float64 under a mask built in other words (masks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from masks import KINDS, dense, mask_of, reaches
from torch import Tensor
from toys import agree, logits_of, prompt

from lineshaft.model import attend
from lineshaft.model.attend import IndexQuery, LatentQuery, PackedCausal
from lineshaft.model.config import GroupedQueryAttention, Indexer, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops import reference
from lineshaft.ops.formats import Integer
from lineshaft.ops.reach import Causal, Reach, Window

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "max_position_embeddings": 64, "vocab_size": 61}
LATENT = {
    "num_attention_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
EXPERTS = MixtureOfExperts(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=2)
"""Both layers stay dense: routed experts would hang on the last bit of a score."""


def model_of(attention: GroupedQueryAttention | LatentAttention, *reach: Reach) -> Decoder:
    latent = isinstance(attention, LatentAttention)
    family = {"family": "deepseek_v3", "moe": EXPERTS} if latent else {"family": "llama"}
    model = Decoder(ModelConfig.model_validate({**SIZES, **family, "attention": attention, "reach": list(reach), "initializer_range": 0.2}))
    model.initialise(5)
    return model.eval().requires_grad_(False)


GROUPED = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
INDEXED = LatentAttention(**LATENT, indexer=Indexer(num_heads=12, head_dim=8, top_k=4))
MODELS = {
    **{f"grouped-{name}": model_of(GROUPED, reach) for name, reach in KINDS.items()},
    **{f"latent-{name}": model_of(LatentAttention(**LATENT), reach) for name, reach in KINDS.items()},
    "grouped-mixture": model_of(GROUPED, KINDS["window"], KINDS["blocks"]),
    "latent-mixture": model_of(LatentAttention(**LATENT), KINDS["window-global"], KINDS["causal"]),
    "indexed": model_of(INDEXED, Causal()),
    "indexed-window": model_of(INDEXED, Window(window=9, global_tokens=1), Causal()),
}


@pytest.fixture(params=["alone", "together"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Documents one by one in tiles of a few queries, or all together under a mask: the two ways of PackedCausal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "ALONE", 1 if request.param == "alone" else 10**6)
        patch.setattr(attend, "SCORED", 5)
        patch.setattr(reference, "QUERIES", 5)
        yield


def packed(model: Decoder, documents: list[list[int]], row: int | None = None) -> Tensor:
    lengths = [len(document) for document in documents]
    starts = [0, *accumulate(lengths)][:-1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.tensor([token for document in documents for token in document])
    with torch.inference_mode():
        return model(tokens, positions, PackedCausal(starts, len(tokens), row))


def texts(lengths: list[int]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


# -- whole models ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
@example(lengths=[1, 1, 1])
@example(lengths=[30])
def test_a_packed_document_is_as_it_is_alone(name: str, lengths: list[int]) -> None:
    documents = texts(lengths)
    alone = torch.cat([logits_of(MODELS[name], document) for document in documents])
    assert agree(packed(MODELS[name], documents), alone)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4))
@example(rows=[[20], [20], [20]])
def test_rows_of_documents_are_as_they_are_alone(name: str, rows: list[list[int]]) -> None:
    row = max(sum(lengths) for lengths in rows)
    documents = texts([length for lengths in rows for length in [*lengths, *([row - sum(lengths)] if sum(lengths) < row else [])]])
    alone = torch.cat([logits_of(MODELS[name], document) for document in documents])
    assert agree(packed(MODELS[name], documents, row), alone)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", MODELS)
def test_a_token_run_after_its_past_is_as_in_the_whole(name: str) -> None:
    text = prompt(17)
    one_by_one = torch.cat([logits_of(MODELS[name], text[: end + 1])[-1:] for end in range(len(text))])
    assert agree(logits_of(MODELS[name], text), one_by_one)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", MODELS)
def test_nothing_before_a_changed_token_moves_by_a_bit(name: str) -> None:
    documents = texts([9, 14, 9])
    before = packed(MODELS[name], documents)
    documents[1][5] = (documents[1][5] + 1) % 61
    after = packed(MODELS[name], documents)
    others = [*range(14), *range(23, 32)]
    assert torch.equal(before[others], after[others])
    assert not agree(before[14:23], after[14:23], 1e-3)


def test_every_kind_makes_another_model() -> None:
    """Else the tests above would say nothing: the weights are the same, and the reach alone differs."""
    for attention in ("grouped", "latent"):
        logits = [logits_of(MODELS[f"{attention}-{name}"], prompt(25)) for name in [*KINDS, "mixture"]]
        for i, one in enumerate(logits):
            assert all(not agree(one, other, 1e-2) for other in logits[:i])
    assert not agree(logits_of(MODELS["indexed"], prompt(25)), logits_of(MODELS["indexed-window"], prompt(25)), 1e-2)


# -- attention by itself -----------------------------------------------------------------------------------------


def tensors(tokens: int, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, *shape, generator=generator) for shape in shapes]


@pytest.mark.usefixtures("way")
@settings(max_examples=40)
@given(reach=reaches(), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 10**6))
@example(reach=Window(window=100), lengths=[11], seed=0)
@example(reach=Window(window=1), lengths=[4, 1, 6], seed=0)
def test_attention_is_dense_attention_under_the_mask(reach: Reach, lengths: list[int], seed: int) -> None:
    q, k, v = tensors(sum(lengths), (4, 6), (2, 6), (2, 6), seed=seed)
    starts = [0, *accumulate(lengths)]
    got = PackedCausal(starts[:-1], sum(lengths)).gqa(0, q, k, v, 0.7, reach)
    for start, length in zip(starts, lengths, strict=False):
        own = slice(start, start + length)
        assert (got[own].double() - dense(q[own], k[own], v[own], mask_of(reach, length), 0.7)).abs().max() <= 1e-6 * max(1, v.abs().max())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reach", KINDS.values(), ids=KINDS)
def test_attention_moves_by_no_bit_when_the_future_or_another_document_changes(reach: Reach) -> None:
    q, k, v = tensors(24, (4, 8), (2, 8), (2, 8))
    run = PackedCausal([0, 10], 24)
    before = run.gqa(0, q, k, v, 0.3, reach)
    k[15:], v[15:] = 5.0, -5.0
    assert torch.equal(before[:15], run.gqa(0, q, k, v, 0.3, reach)[:15])
    k[:10], v[:10] = 7.0, -7.0
    assert torch.equal(before[10:15], run.gqa(0, q, k, v, 0.3, reach)[10:15])


@pytest.mark.parametrize("tokens", [300, 129])
@pytest.mark.parametrize("reach", [Causal(), Window(window=300), Window(window=40, global_tokens=2)], ids=str)
def test_a_long_document_is_never_masked_as_a_whole(reach: Reach, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no mask has none; what needs one has it for a few queries at a time."""
    sizes = []
    sdpa = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        sizes.append(0 if mask is None else mask.numel())
        return sdpa(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    PackedCausal([0], tokens).gqa(0, *tensors(tokens, (1, 4), (1, 4), (1, 4)), 0.5, reach)
    assert max(sizes) <= (0 if reach != Window(window=40, global_tokens=2) else 64 * (64 + 39 + 2))


@pytest.mark.parametrize("reach", KINDS.values(), ids=KINDS)
@pytest.mark.usefixtures("way")
def test_gradients_flow_as_in_dense_attention(reach: Reach) -> None:
    q, k, v, weight = tensors(20, (4, 6), (2, 6), (2, 6), (4, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad((PackedCausal([0, 7], 20).gqa(0, q, k, v, 0.4, reach) * weight).sum(), leaves)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:7, :7], mask[7:, 7:] = torch.from_numpy(mask_of(reach, 7)), torch.from_numpy(mask_of(reach, 13))
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.4
    out = torch.einsum("hts,shv->thv", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    expected = torch.autograd.grad((out * weight).sum(), leaves)
    assert all(torch.allclose(mine, other, atol=1e-5) for mine, other in zip(got, expected, strict=True))


@pytest.mark.parametrize(("starts", "tokens", "row"), [([0, 3], 8, 4), ([1], 4, None), ([0], 8, 4), ([], 4, None), ([0], 7, 4)])
def test_documents_that_do_not_fit_the_rows_are_refused(starts: list[int], tokens: int, row: int | None) -> None:
    with pytest.raises(ValueError, match="row"):
        PackedCausal(starts, tokens, row)


# -- the indexer -------------------------------------------------------------------------------------------------


def index_of(tokens: int, seed: int, top_k: int, *, ties: bool = False) -> IndexQuery:
    """`ties`: small whole numbers, so that many scores are equal and all are exact."""
    q, weight, key = tensors(tokens, (3, 4), (3,), (4,), seed=seed)
    return IndexQuery(q.round(), weight.round(), key.round(), top_k) if ties else IndexQuery(q, weight, key, top_k)


def chosen_of(index: IndexQuery, mask: np.ndarray) -> np.ndarray:
    """In float64, by sorting: the best of what is visible, the earlier of equal ones first."""
    q, weight, key = (x.detach().double().numpy() for x in (index.q_TJD, index.weight_TJ, index.key_TD))
    chosen = np.zeros_like(mask)
    for token in range(len(mask)):
        score = np.maximum(key @ q[token].T / np.sqrt(key.shape[1]), 0) @ weight[token]
        visible = sorted(np.flatnonzero(mask[token]), key=lambda place: (-score[place], place))
        chosen[token, visible[: index.top_k]] = True
    return chosen


@settings(max_examples=60)
@given(reach=reaches(), tokens=st.integers(1, 30), top_k=st.integers(1, 12), ties=st.booleans(), seed=st.integers(0, 10**6))
def test_the_indexer_chooses_the_best_of_what_may_be_seen(reach: Reach, tokens: int, top_k: int, ties: bool, seed: int) -> None:
    index = index_of(tokens, seed, top_k, ties=ties)
    expected = chosen_of(index, mask_of(reach, tokens))
    assert np.array_equal(index.chosen(index.key_TD, 0, reach).numpy(), expected)
    cut = tokens // 2
    assert np.array_equal(index.of(slice(cut, tokens)).chosen(index.key_TD, cut, reach).numpy(), expected[cut:])


@pytest.mark.usefixtures("way")
@settings(max_examples=30)
@given(reach=reaches(), lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3), top_k=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_latent_attention_sees_what_the_indexer_chose(reach: Reach, lengths: list[int], top_k: int, seed: int) -> None:
    total, starts = sum(lengths), [0, *accumulate(lengths)]
    index, (query, latents, rotated) = index_of(total, seed, top_k), latent_of(total, total, seed)
    got = PackedCausal(starts[:-1], total).mla(0, query, latents, rotated, 0.2, reach, index)
    keys, values = query.expand(latents)
    q, k = torch.cat([query.nope_THN, query.rope_THR], -1), torch.cat([keys, rotated[:, None].expand(-1, 3, -1)], -1)
    for start, length in zip(starts, lengths, strict=False):
        own = slice(start, start + length)
        seen = chosen_of(index.of(own), mask_of(reach, length))
        assert agree(got[own].double(), dense(q[own], k[own], values[own], seen, 0.2))


def test_the_choice_has_no_gradient_and_what_is_chosen_has() -> None:
    index, (query, latents, rotated) = index_of(12, 0, 3), latent_of(12, 12, 0)
    leaves = [x.requires_grad_() for x in (latents, index.key_TD, index.q_TJD)]
    out = PackedCausal([0], 12).mla(0, query, latents, rotated, 0.2, Causal(), index)
    gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    used = chosen_of(index, mask_of(Causal(), 12)).any(0)
    assert np.array_equal(gradients[0].abs().sum(-1).gt(0).numpy(), used)
    assert not used.all()
    assert gradients[1] is gradients[2] is None


# -- latents -----------------------------------------------------------------------------------------------------


def latent_of(
    new: int, context: int, seed: int, widths: tuple[int, int, int] = (4, 6, 8), fmt: Integer | None = None
) -> tuple[LatentQuery, Tensor, Tensor]:
    """(queries with their up-projection, latents, rotated keys)."""
    generator = torch.Generator().manual_seed(seed)
    (nope, rope, value), heads, latent = widths, 3, 12
    up = Linear(latent, heads * (nope + value)).requires_grad_(False)
    up.weight.normal_(generator=generator)
    if fmt is not None:
        up.recode(fmt)
    query = LatentQuery(torch.randn(new, heads, nope, generator=generator), torch.randn(new, heads, rope, generator=generator), up)
    return query, torch.randn(context, latent, generator=generator), torch.randn(context, rope, generator=generator)


@pytest.mark.parametrize("fmt", [None, Integer(8), Integer(8, 4)])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    context=st.integers(1, 30),
    new=st.integers(1, 5),
    widths=st.sampled_from([(4, 6, 8), (8, 2, 4), (1, 2, 3)]),
)
def test_absorbed_latents_give_what_expanded_ones_give(
    fmt: Integer | None, seed: int, context: int, new: int, widths: tuple[int, int, int]
) -> None:
    query, latents, rotated = latent_of(new, context, seed, widths, fmt)
    keys, values = query.expand(latents)
    scores = torch.einsum("thn,shn->hts", query.nope_THN, keys) + torch.einsum("thr,sr->hts", query.rope_THR, rotated)
    expanded = torch.einsum("hts,shv->thv", (scores * 0.2).softmax(-1), values)

    queries = query.absorbed()
    scores = torch.einsum("thc,sc->hts", queries, latents) + torch.einsum("thr,sr->hts", query.rope_THR, rotated)
    absorbed = query.values(torch.einsum("hts,sc->thc", (scores * 0.2).softmax(-1), latents))
    assert agree(absorbed, expanded)


# -- forms that are wrong, and why -------------------------------------------------------------------------------

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Window attention of one document: q, k, v [T, D] to [T, D]."""
HERE = Window(window=8, global_tokens=2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.reach_gqa(q[:, None], k[:, None], v[:, None], q.shape[-1] ** -0.5, HERE)[:, 0]


def mask_that_looks_ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A band on both sides of the diagonal, filled in a loop, laid over a full product."""
    mask = torch.zeros(len(q), len(q), dtype=torch.bool)
    for i in range(len(q)):
        for j in range(len(q)):
            mask[i, j] = abs(i - j) <= HERE.window // 2
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]


def scores_times_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Raw scores times 0 or 1, and that times the values: no softmax, no 1/sqrt(d), both directions, no global tokens."""
    mask = torch.zeros(len(q), len(q))
    for i in range(len(q)):
        mask[i, max(0, i - HERE.window // 2) : i + HERE.window // 2 + 1] = 1
    return (q @ k.T * mask) @ v


def sees_no_future(form: Form) -> None:
    q, k, v = tensors(40, (6,), (6,), (6,))
    before = form(q, k, v)
    k[21:], v[21:] = 3.0, -3.0
    assert torch.equal(form(q, k, v)[:21], before[:21])


def is_dense_attention_under_the_mask(form: Form) -> None:
    q, k, v = tensors(40, (6,), (6,), (6,))
    expected = dense(q[:, None], k[:, None], v[:, None], mask_of(HERE, 40), 6**-0.5)[:, 0]
    assert (form(q, k, v).double() - expected).abs().max() <= 1e-6


def weights_sum_to_one(form: Form) -> None:
    q, k, _ = tensors(40, (6,), (6,), (6,))
    assert torch.allclose(form(q, k, torch.ones(40, 6)), torch.ones(40, 6), atol=1e-6)


def sees_the_global_tokens(form: Form) -> None:
    q, k, v = tensors(40, (6,), (6,), (6,))
    before = form(q, k, v)[-1]
    v[0] += 100
    assert not torch.allclose(form(q, k, v)[-1], before)


def multiplies_what_it_sees_and_little_more(form: Form) -> None:
    pairs, sdpa = 0, F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *rest: object, **options: object) -> Tensor:
        nonlocal pairs
        pairs += q.shape[-2] * k.shape[-2]
        return sdpa(q, k, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", counted)
        patch.setattr(reference, "QUERIES", 4)
        form(*tensors(200, (6,), (6,), (6,)))
    assert 0 < pairs <= 1.5 * HERE.pairs(200)


CHECKS = [
    sees_no_future,
    is_dense_attention_under_the_mask,
    weights_sum_to_one,
    sees_the_global_tokens,
    multiplies_what_it_sees_and_little_more,
]
WRONG = {mask_that_looks_ahead: {weights_sum_to_one}, scores_times_mask: set()}
"""What each of them gets right."""


@pytest.mark.parametrize("check", CHECKS)
def test_our_window_passes(check: Callable[[Form], None]) -> None:
    check(ours)


@pytest.mark.parametrize(("form", "check"), [(form, check) for form, right in WRONG.items() for check in CHECKS if check not in right])
def test_the_forms_that_are_wrong_fail(form: Form, check: Callable[[Form], None]) -> None:
    with pytest.raises(AssertionError):
        check(form)
