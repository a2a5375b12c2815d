"""Choosing tokens: the rules beside float64 and transformers; the kernels beside the rules, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from native_cases import ISAS, NEEDS_NATIVE, on
from sample_cases import EDGE, RULES, TIED, Rule, choices, oracle
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lineshaft.ops import native, reference
from lineshaft.ops.sampling import truncated

PLAIN: Rule = (1.0, 0, 1.0, 0.0)
each_isa = pytest.mark.parametrize("isa", ISAS)


@given(st.lists(TIED, min_size=1, max_size=20), RULES)
def test_truncation_is_that_of_the_oracle(values: list[float], rule: Rule) -> None:
    wanted, nearest = oracle(values, rule)
    assume(nearest > EDGE)
    seen = truncated(torch.tensor(values), *rule).numpy()
    assert ((seen > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True), RULES)
def test_truncation_is_that_of_transformers_where_no_tokens_are_tied(values: list[float], rule: Rule) -> None:
    assume(np.diff(sorted(values)).min() > 1e-3)
    assume(oracle(values, rule)[1] > EDGE)
    temperature, top_k, top_p, min_p = rule
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    wanted = warpers(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([values]))[0].softmax(-1)
    torch.testing.assert_close(truncated(torch.tensor(values), *rule), wanted, rtol=1e-4, atol=1e-6)


def test_tokens_as_likely_as_the_last_of_the_top_k_stay_in() -> None:
    chances = truncated(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 1.0, 2, 1.0, 0.0)
    assert (chances > 0).tolist() == [False, True, True, True, False]
    assert chances[2] == chances[3]


def test_top_k_at_or_above_the_vocabulary_changes_nothing() -> None:
    values = torch.tensor([1.0, 3.0, 2.0])
    for top_k in (3, 4, 10**9):
        assert torch.equal(truncated(values, 1.0, top_k, 1.0, 0.0), truncated(values, *PLAIN))


def test_equally_likely_tokens_enter_top_p_in_the_order_of_their_ids() -> None:
    assert (truncated(torch.zeros(8), 1.0, 0, 0.3, 0.0) > 0).tolist() == [True] * 3 + [False] * 5


def test_top_p_stops_as_soon_as_it_is_reached() -> None:
    assert (truncated(torch.zeros(4), 1.0, 0, 0.5, 0.0) > 0).tolist() == [True, True, False, False]


# -- borders that every kernel must hold -----------------------------------------------------------------------------

KERNELS = ["reference", *ISAS]


def kept(kernel: str, values: list[float], rule: Rule, draws: int = 256) -> set[int]:
    """Tokens that some luck chooses."""
    logits = torch.tensor([values] * draws, dtype=torch.float32)
    table = torch.tensor([[*rule, (draw + 0.5) / draws] for draw in range(draws)], dtype=torch.float64)
    if kernel == "reference":
        return set(reference.sample(logits, table).tolist())
    with on(kernel):
        return set(native.sample(logits, table).tolist())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("values", "rule", "wanted"),
    [
        ([1.0, 3.0, 2.0, 2.0, 0.0], (1.0, 2, 1.0, 0.0), {1, 2, 3}),
        ([1.0, 3.0, 2.0], (1.0, 3, 1.0, 0.0), {0, 1, 2}),
        ([1.0, 3.0, 2.0], (1.0, 10**9, 1.0, 0.0), {0, 1, 2}),
        ([0.0] * 8, (1.0, 0, 0.3, 0.0), {0, 1, 2}),
        ([0.0] * 4, (1.0, 0, 0.5, 0.0), {0, 1}),
        ([0.0] * 40, (1.0, 7, 0.5, 0.0), set(range(20))),
        ([0.0, -100.0, 0.0], (1.0, 3, 0.999, 0.0), {0, 2}),
        ([2.0, 2.0, 1.0], (0.0, 0, 1.0, 0.0), {0}),
        *(([-40.0, 900.0, 899.0, -1e30], (cold, 0, 1.0, 0.0), {1}) for cold in (1e-3, 1e-30, 1e-45, 5e-324)),
        *(([0.0, 2.0, 1.0], (1.0, 0, top_p, 0.0), {1}) for top_p in (1e-300, 1e-46, 5e-324)),
        ([0.0, 2.0, 1.0], (1.0, 0, 1.0, 1.0), {1}),
        ([5.0, -5.0], (1e300, 0, 1.0, 0.0), {0, 1}),
        ([1.0, -float("inf"), 0.0], (1e300, 0, 1.0, 0.0), {0, 2}),
        ([-float("inf"), 1.0, -float("inf"), 0.0], (1.0, 0, 1.0, 0.0), {1, 3}),
        ([-float("inf"), 1.0, -float("inf"), 0.0], (1.0, 1, 0.9, 0.0), {1}),
    ],
)
def test_borders(kernel: str, values: list[float], rule: Rule, wanted: set[int]) -> None:
    assert kept(kernel, values, rule) == wanted


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", [PLAIN, (0.0, 0, 1.0, 0.0), (0.5, 2, 0.9, 0.1)])
def test_what_is_not_a_number_is_never_chosen(kernel: str, rule: Rule) -> None:
    nan, infinite = float("nan"), float("inf")
    assert kept(kernel, [nan, 1.0, nan, 1.0], rule) == ({1} if rule[0] == 0 else {1, 3})
    assert kept(kernel, [0.0] * 3 + [1.0] + [0.0] * 12 + [nan] * 20, (0.1, 1, 1.0, 0.0)) == {3}
    assert kept(kernel, [0.0, infinite, nan, infinite], rule) == {1}
    assert kept(kernel, [nan] * 20, rule) == {-1}
    assert kept(kernel, [-infinite] * 20, rule) == {-1}


@NEEDS_NATIVE
@each_isa
@pytest.mark.parametrize("rule", [PLAIN, (0.7, 0, 0.9, 0.0), (0.7, 40, 1.0, 0.0), (1.3, 1000, 0.8, 0.0), (0.7, 0, 1.0, 0.02)])
def test_a_real_vocabulary_is_chosen_from_as_by_the_reference(isa: str, rule: Rule) -> None:
    """The ends of chances differ by rounding: a token must be that of a place at most 1e-5 away."""
    logits = torch.randn(1, 151936, generator=torch.Generator().manual_seed(2)) * 3
    places = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    table = torch.tensor([[*rule, place] for place in places.tolist()], dtype=torch.float64)
    ends = truncated(logits[0], *rule).double().cumsum(0)
    with on(isa, threads=2):
        tokens = native.sample(logits.expand(40, -1), table)
    starts = torch.cat([torch.zeros(1, dtype=torch.float64), ends])[tokens]
    assert (places > starts - 1e-5).all()
    assert (places < ends[tokens] + 1e-5).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_luck_next_to_one_finds_a_token_that_is_not_excluded(kernel: str) -> None:
    """Chances are added up in pieces: what rounding leaves over must not end behind the last of them, or at none."""
    logits = 4 * torch.randn(60, 32000, generator=torch.Generator().manual_seed(5))  # chances of so many sizes that sums are rounded
    logits[:, 0] = logits[:, 16000:] = -1e9
    table = torch.tensor([[1.0, 0, 1.0, 0.0, 1 - place * 2.0**-53] for place in (1, 2, 3)] * 20, dtype=torch.float64)
    if kernel == "reference":
        tokens = reference.sample(logits, table)
    else:
        with on(kernel):
            tokens = native.sample(logits, table)
    assert ((tokens > 0) & (tokens < 16000)).all()


@NEEDS_NATIVE
@each_isa
def test_no_share_at_all_is_that_of_the_likeliest(isa: str) -> None:
    assert kept(isa, [0.0, 2.0, 1.0], (1.0, 0, 0.0, 0.0)) == kept("reference", [0.0, 2.0, 1.0], (1.0, 0, 0.0, 0.0)) == {1}


@NEEDS_NATIVE
@each_isa
@settings(max_examples=20)
@given(choices(), st.integers(1, 3))
def test_a_row_gets_the_same_token_in_any_company(isa: str, drawn: tuple[torch.Tensor, torch.Tensor], threads: int) -> None:
    logits, table = drawn
    with on(isa, threads=threads):
        together = native.sample(logits, table)
        alone = torch.cat([native.sample(logits[row : row + 1], table[row : row + 1]) for row in range(len(logits))])
    assert torch.equal(together, alone)


@NEEDS_NATIVE
def test_tables_that_do_not_fit_are_refused() -> None:
    logits, table = torch.zeros(2, 9), torch.zeros(2, 5, dtype=torch.float64)
    for bad in ((logits[:1], table), (logits, table[:, :4]), (logits.double(), table), (logits, table.float()), (logits[:, :0], table)):
        with pytest.raises(ValueError, match="sample: logits"):
            native.sample(*bad)
