"""Which tokens a token sees: against sets built token by token; and what that costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import mask_of, reaches, seen_by

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.model.config import Architecture
from lineshaft.ops.reach import Blocks, Causal, Reach, Window


def covered(reach: Reach, first: int, last: int) -> list[int]:
    return [position for start, stop in reach.spans(first, last) for position in range(start, stop)]


@given(reach=reaches(), tokens=st.integers(1, 50))
def test_a_token_sees_what_the_definition_says(reach: Reach, tokens: int) -> None:
    places = torch.arange(tokens)
    seen = reach.visible(places[:, None], places[None])
    assert seen.numpy().tolist() == mask_of(reach, tokens).tolist()
    assert [[bool(reach.visible(q, k)) for k in range(tokens)] for q in range(tokens)] == seen.tolist()


@given(reach=reaches(), first=st.integers(0, 40), size=st.integers(1, 15))
def test_the_spans_hold_all_that_is_seen_ascending_and_nothing_of_the_future(reach: Reach, first: int, size: int) -> None:
    spans = reach.spans(first, first + size)
    assert all(start < stop for start, stop in spans)
    assert all(one[1] < other[0] for one, other in pairwise(spans))
    assert spans[-1][1] == first + size
    assert set(covered(reach, first, first + size)) >= set().union(*(seen_by(reach, q) for q in range(first, first + size)))


@given(reach=reaches(), q=st.integers(0, 60))
def test_the_spans_of_one_token_hold_nothing_else(reach: Reach, q: int) -> None:
    """Kernels need no mask for a decoding step, and read not one key too many."""
    assert set(covered(reach, q, q + 1)) == seen_by(reach, q)


@given(reach=reaches(), first=st.integers(0, 40), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_spans_of_a_part_lie_in_those_of_the_whole(reach: Reach, first: int, cuts: list[int]) -> None:
    """Kernels gather once for all queries and cut the tiles' keys out of that."""
    whole, start = reach.spans(first, first + sum(cuts)), first
    for cut in cuts:
        for low, high in reach.spans(start, start + cut):
            assert any(begin <= low and high <= end for begin, end in whole)
        start += cut


@given(reach=reaches(), tokens=st.integers(0, 70))
def test_the_pairs_are_counted_right(reach: Reach, tokens: int) -> None:
    assert reach.pairs(tokens) == mask_of(reach, tokens).sum()


def test_the_window_costs_what_the_formula_says() -> None:
    """1 - (nw - w^2/2) / (n^2/2): 25 % at 2w, 56 % at 4w, 60 % at 4.44w, 77 % at 8w."""
    window = 2048
    for times, saving in ((2, 0.25), (4, 0.5625), (4.4365, 0.60), (8, 0.7656)):
        tokens = round(times * window)
        assert 1 - Window(window=window).pairs(tokens) / Causal().pairs(tokens) == pytest.approx(saving, abs=2e-4)


def test_a_reach_is_chosen_by_its_kind_and_refused_when_it_makes_no_sense() -> None:
    table = {
        "family": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 8,
        "attention": {"kind": "gqa", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    }
    mixture = [{"kind": "window", "window": 4, "global_tokens": 1}, {"kind": "blocks", "block": 2, "stride": 3}]
    read = load(Architecture, {**table, "reach": mixture})
    assert [read.reach_of(layer) for layer in range(2)] == [Window(window=4, global_tokens=1), Blocks(block=2, stride=3)]
    assert load(Architecture, table).reach_of(1) == Causal()
    for wrong in ({"kind": "window", "window": 0}, {"kind": "blocks", "block": 2}, {"kind": "window", "window": 4, "global_tokens": -1}):
        with pytest.raises(ConfigError, match="reach"):
            load(Architecture, {**table, "reach": [wrong]})
