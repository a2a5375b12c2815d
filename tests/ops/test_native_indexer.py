"""What an indexer chooses, by the native kernels: the reference's choice to the slot, whatever the company, on every instruction set."""

from __future__ import annotations

import indexer_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, NEEDS_NATIVE, on
from torch import Tensor

from lineshaft.ops import native, reference_indexer
from lineshaft.ops.reach import Causal, Reach, Window

pytestmark = NEEDS_NATIVE
each_isa = pytest.mark.parametrize("isa", ISAS)
THREADS = st.integers(1, 3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOP = 40


@each_isa
@settings(max_examples=30)
@given(data=st.data(), dtype=DTYPES, threads=THREADS)
def test_the_earlier_of_equal_scores_is_chosen(isa: str, data: st.DataObject, dtype: torch.dtype, threads: int) -> None:
    given_ = data.draw(indexer_cases.choices(dtype))
    with on(isa, threads):
        found = native.choose_keys(*given_)
    wanted = indexer_cases.exact_choose_keys(*given_)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def drawn(seed: int, first: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, weights, keys of one text in pages of 16, and its table."""
    luck = torch.Generator().manual_seed(seed)
    pages = -(-(first + tokens) // 16)
    q, weight = torch.randn(tokens, 6, 24, generator=luck).to(dtype), torch.randn(tokens, 6, generator=luck)
    return q, weight, torch.randn(pages + 2, 16, 24, generator=luck).to(dtype), torch.randperm(pages + 2, generator=luck).int()


def chosen(text: tuple[Tensor, Tensor, Tensor, Tensor], first: int, cuts: list[int], reach: Reach, longest: int) -> Tensor:
    """Slots of all tokens of a text that comes in chunks with these ends, in one call."""
    q, weight, pages, table = text
    starts = [0, *cuts[:-1]]
    chunks = torch.tensor([(start, first + start, stop - start, 0) for start, stop in zip(starts, cuts, strict=True)])
    return native.choose_keys(q[: cuts[-1]], weight[: cuts[-1]], pages, chunks, table, TOP, reach, longest)[0]


@each_isa
@settings(max_examples=15)
@given(data=st.data(), dtype=DTYPES, first=st.sampled_from([0, 30, 63, 150, 400]), tokens=st.integers(1, 20))
def test_a_token_chooses_the_same_alone_and_in_any_company(
    isa: str, data: st.DataObject, dtype: torch.dtype, first: int, tokens: int
) -> None:
    text, reach = drawn(first + tokens, first, tokens, dtype), data.draw(st.sampled_from([Causal(), Window(window=90, global_tokens=20)]))
    with on(isa, 1):
        whole = chosen(text, first, [tokens], reach, 1)
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens))) | {tokens})
    with on(isa, data.draw(THREADS)):
        assert torch.equal(chosen(text, first, cuts, reach, 4096), whole)
    for token in range(tokens):
        q, weight, *rest = text
        with on(isa, data.draw(THREADS)):
            assert torch.equal(chosen((q[token:], weight[token:], *rest), first + token, [1], reach, 4096)[0], whole[token])


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_chosen_scores_as_well_as_the_references_choice(isa: str, dtype: torch.dtype) -> None:
    """Scores that differ by rounding alone may change places."""
    first, tokens = 700, 9
    q, weight, pages, table = drawn(5, first, tokens, dtype)
    with on(isa, 2):
        slots = chosen((q, weight, pages, table), first, [tokens], Causal(), 4096)
    scores_TS = reference_indexer.scores(q, weight, pages.flatten(0, 1))
    wanted = reference_indexer.choose_keys(q, weight, pages, torch.tensor([[0, first, tokens, 0]]), table, TOP, Causal(), 4096)[0]
    ours, theirs = (scores_TS.gather(1, each.long()).sort().values for each in (slots, wanted))
    assert len(set(slots.flatten().tolist())) > TOP
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_choice_among_nothing() -> None:
    q, weight, pages, table = drawn(1, 4, 1, torch.float32)
    slots, found, count = native.choose_keys(q[:0], weight[:0], pages, torch.empty(0, 4, dtype=torch.int64), table, 3, Causal(), 9)
    assert (slots.shape, found.shape, count.tolist()) == ((0, 3), (0, 4), [0])


@pytest.mark.parametrize("wrong", ["weights", "dtype", "width", "top"])
def test_wrong_input_is_refused(wrong: str) -> None:
    q, weight, pages, table = drawn(1, 4, 2, torch.float32)
    chunks, top = torch.tensor([[0, 4, 2, 0]]), 3
    if wrong == "weights":
        weight = weight[:, :5]
    elif wrong == "dtype":
        pages = pages.bfloat16()
    elif wrong == "width":
        pages = pages[..., :20]
    else:
        top = 0
    with pytest.raises(ValueError, match="choose_keys: "):
        native.choose_keys(q, weight, pages, chunks, table, top, Causal(), 9)


@each_isa
@settings(max_examples=20)
@given(rows=st.integers(1, 9), width=st.integers(1, 140), dtype=DTYPES, threads=THREADS)
def test_a_row_of_a_layer_norm_is_itself_in_any_company(isa: str, rows: int, width: int, dtype: torch.dtype, threads: int) -> None:
    luck = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(rows, width, generator=luck) + 3).to(dtype), torch.randn(width).to(dtype), torch.randn(width)
    with on(isa, threads):
        whole = native.layer_norm(x, weight, bias, 1e-6)
    with on(isa, 1):
        assert all(torch.equal(native.layer_norm(x[row : row + 1], weight, bias, 1e-6)[0], whole[row]) for row in range(rows))
    wanted = indexer_cases.exact_layer_norm(x.double(), weight.double(), bias.double(), 1e-6)
    assert (whole.double() - wanted).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-2) * (1 + wanted.abs().max())
