"""Training batches: rows cut from the token stream in an order that seed and position alone decide.

Batch number n can be made without making those before it, so a run that was killed goes on exactly where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lineshaft.base.errors import TrainingError
from lineshaft.records.tokens import TokenStream

IGNORE = -100
"""Target of a position that predicts nothing: the end of a document does not foretell the next one."""


@dataclass(frozen=True)
class Batch:
    """Rows of documents packed into one row of T tokens."""

    tokens_T: Tensor
    positions_T: Tensor
    """Distance from the start of the document, or of the part of it that lies in this row."""
    targets_T: Tensor
    """The next token, or IGNORE."""
    starts_D: Tensor
    """Index of the first token of each document part."""
    row: int
    """No document part crosses a multiple of this."""


class RowReader:
    """Rows of `row` tokens and their targets from one stream; row r begins at token r * row."""

    def __init__(self, stream: TokenStream, row: int) -> None:
        if len(stream) <= row:
            told = "give more text or a smaller sequence_tokens"
            raise TrainingError(f"the text has {len(stream)} tokens, too few for one row of {row} and its targets: {told}")
        self.stream, self.row = stream, row
        self.rows = (len(stream) - 1) // row
        self._starts = stream.starts()

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """These rows as one packed batch."""
        tokens = np.stack([self.stream.read(r * self.row, (r + 1) * self.row + 1) for r in rows])
        begins = np.zeros((len(rows), self.row + 1), bool)
        for line, r in zip(begins, rows, strict=True):
            first, last = np.searchsorted(self._starts, [r * self.row, (r + 1) * self.row + 1])
            line[self._starts[first:last] - r * self.row] = True
        targets = np.where(begins[:, 1:], IGNORE, tokens[:, 1:])
        begins[:, 0] = True
        starts = np.flatnonzero(begins[:, :-1])
        lengths = np.diff(starts, append=len(rows) * self.row)
        positions = np.arange(len(rows) * self.row) - np.repeat(starts, lengths)
        return Batch(_tensor(tokens[:, :-1]), _tensor(positions), _tensor(targets), _tensor(starts), row=self.row)

    def documents(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The number of the document, from 0, that each token of these rows belongs to, int64 [T]."""
        places = rows[:, None] * self.row + np.arange(self.row)
        return _tensor(np.searchsorted(self._starts, places, side="right") - 1)


def _tensor(numbers: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(-1)))  # rows of one token reshape to a view with gaps


class ShuffledRows:
    """An endless sequence of rows: each epoch is a fresh permutation of all rows, drawn from seed and epoch."""

    def __init__(self, reader: RowReader, rows_a_batch: int, seed: int) -> None:
        self.reader, self.rows_a_batch, self.seed = reader, rows_a_batch, seed
        self._epoch = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(reader.rows))

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over all epochs."""
        return self.reader.batch(self.rows(number * self.rows_a_batch, self.rows_a_batch))

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The rows at these places of the sequence."""
        places = [divmod(place, self.reader.rows) for place in range(first, first + count)]
        return np.array([self._epoch(epoch)[place] for epoch, place in places])
