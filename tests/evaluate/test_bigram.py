"""The bigram baseline against a dictionary."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.evaluate import bigram
from lineshaft.evaluate.bigram import DISCOUNT, Bigram

VOCABULARY = 6


class Listed:
    """A token stream of a list."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, first: int, last: int) -> np.ndarray:
        assert 0 <= first <= last <= len(self)
        return self.tokens[first:last]


def dictionary(tokens: list[int]) -> dict[tuple[int, int], float]:
    """p(b | a) for every pair, from the formula in the class's docstring."""
    pairs, singles = Counter(itertools.pairwise(tokens)), Counter(tokens)
    chances = {}
    for a in range(VOCABULARY):
        total = sum(count for (before, _), count in pairs.items() if before == a)
        kinds = sum(before == a for before, _ in pairs)
        for b in range(VOCABULARY):
            single = (singles[b] + 1) / (len(tokens) + VOCABULARY)
            seen = max(pairs[a, b] - DISCOUNT, 0) / total if total else 0.0
            chances[a, b] = seen + (DISCOUNT * kinds / total if total else 1.0) * single
    return chances


@given(st.lists(st.integers(0, VOCABULARY - 2), max_size=40), st.integers(1, 9))
def test_chances_are_the_dictionarys_and_sum_to_one_after_seen_and_unseen_tokens(tokens: list[int], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigram, "CHUNK", chunk)  # pairs across the border of two chunks count as well
        model = Bigram(Listed(tokens), VOCABULARY)
    before, after = (part.ravel() for part in np.meshgrid(range(VOCABULARY), range(VOCABULARY), indexing="ij"))
    seen = np.exp(model.log_prob(before, after))
    np.testing.assert_allclose(seen.reshape(VOCABULARY, -1).sum(1), 1.0, rtol=1e-12)
    wanted = dictionary(tokens)
    np.testing.assert_allclose(seen, [wanted[pair] for pair in zip(before.tolist(), after.tolist(), strict=True)], rtol=1e-12)


def test_a_large_vocabulary_does_not_overflow() -> None:
    last = 4_000_000
    model = Bigram(Listed([last - 1, last - 1, last - 1]), last)
    assert math.exp(model.log_prob(np.array([last - 1]), np.array([last - 1]))[0]) == pytest.approx(1.25 / 2, rel=1e-5)
