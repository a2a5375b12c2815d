"""ROUGE-1, ROUGE-2 and ROUGE-L of a text against a reference: F1, without stemming (Lin 2004).

Ours, and not the package rouge-score: that needs nltk, joblib and absl (0.65 s of imports, 18 MB) for what is written here,
and its own way to cut text into words knows ASCII only. It is the oracle of our tests, which want its numbers to 1e-12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(reference: Sequence[str], words: Sequence[str]) -> tuple[float, float, float]:
    """F1 in the order of KINDS, from 0 to 1, of a text against a reference, both cut into words."""
    return _of_runs(reference, words, 1), _of_runs(reference, words, 2), _f1(longest_common(reference, words), len(reference), len(words))


def _of_runs(reference: Sequence[str], words: Sequence[str], size: int) -> float:
    """Of runs of `size` words: each counts as often as both texts have it."""
    runs, found = (Counter(zip(*(text[first:] for first in range(size)), strict=False)) for text in (reference, words))
    return _f1((runs & found).total(), runs.total(), found.total())


def _f1(common: int, reference: int, found: int) -> float:
    """The harmonic mean of common / reference and common / found."""
    return 2 * common / (reference + found) if common else 0.0


def longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits: a step handles one word of `theirs` and all of `ours` (Hyyrö 2004).

    A bit of `row` is 0 where the subsequence grows by one; carries of the addition move such a place to where it is reached first.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(ours)) - 1
    for word in theirs:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(ours) - row.bit_count()
