"""A bigram model by counting: the baseline that says what a loss means on this text and this tokenizer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lineshaft.records.tokens import TokenStream

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

DISCOUNT = 0.75
"""Taken from every seen pair and given to the unseen ones: absolute discounting (Ney, Essen and Kneser 1994)."""
CHUNK = 1 << 22


class Bigram:
    """p(b | a) = max(count(a b) - d, 0) / count(a) + d * kinds(a) / count(a) * p(b), p(b) from counts plus one."""

    def __init__(self, stream: TokenStream, vocab_size: int) -> None:
        self._vocabulary = vocab_size
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        singles = np.ones(vocab_size, np.int64)
        for first in range(0, len(stream), CHUNK):
            chunk = stream.read(first, min(len(stream), first + CHUNK + 1))
            singles += np.bincount(chunk[:CHUNK], minlength=vocab_size)
            pairs, counts = _add(pairs, counts, *np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True))
        self._pairs, self._counts = np.append(pairs, np.iinfo(np.int64).max), np.append(counts, 0)  # where look-ups past the end land
        before = pairs // vocab_size
        self._after_total = np.bincount(before, counts, vocab_size)
        self._after_kinds = np.bincount(before, minlength=vocab_size)
        self._single: Floats = singles / singles.sum()

    def log_prob(self, before: Ids, after: Ids) -> Floats:
        """Natural log of p(after | before), element by element."""
        key = before * self._vocabulary + after
        place = np.searchsorted(self._pairs, key)
        seen = np.where(self._pairs[place] == key, self._counts[place], 0)
        total = np.maximum(self._after_total[before], 1)
        known = np.maximum(seen - DISCOUNT, 0) / total
        left = np.where(self._after_total[before] > 0, DISCOUNT * self._after_kinds[before] / total, 1.0)
        return np.asarray(np.log(known + left * self._single[after]), dtype=np.float64)


def _add(keys: Ids, counts: Ids, more_keys: Ids, more_counts: Ids) -> tuple[Ids, Ids]:
    merged, place = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    return merged, np.bincount(place, np.concatenate([counts, more_counts])).astype(np.int64)
