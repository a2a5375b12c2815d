"""Batches: what a slow and obvious loop would cut, in an order that the seed alone decides."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.errors import TrainingError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.records.tokens import TokenStream, write_split
from lineshaft.train.batches import IGNORE, Batch, RowReader, ShuffledRows


def stream_of(folder: Path, documents: list[list[int]], shard_tokens: int = 1000) -> TokenStream:
    store = Store(folder)
    with store.draft("tokens", stage="s", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        write_split(draft, "train", iter(documents), 100, shard_tokens)
    (made,) = store.all()
    found: Artifact = store.open(made.id)
    return TokenStream(found, "train")


def oracle(documents: list[list[int]], row: int, number: int) -> list[tuple[int, int, int, bool]]:
    """(token, position, target, begins a part) of one row, place by place."""
    flat = [(token, place) for document in documents for place, token in enumerate(document)]
    cells = []
    for place in range(number * row, (number + 1) * row):
        token, in_document = flat[place]
        position = min(in_document, place - number * row)
        after, after_place = flat[place + 1]
        cells.append((token, position, IGNORE if after_place == 0 else after, position == 0))
    return cells


def cells(batch: Batch) -> list[tuple[int, int, int, bool]]:
    starts = set(batch.starts_D.tolist())
    columns = (batch.tokens_T.tolist(), batch.positions_T.tolist(), batch.targets_T.tolist())
    return [(*cell, place in starts) for place, cell in enumerate(zip(*columns, strict=True))]


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=15),
    st.integers(1, 9),
    st.integers(1, 30),
    st.data(),
)
def test_rows_are_what_a_slow_loop_cuts(documents: list[list[int]], row: int, shard_tokens: int, data: st.DataObject) -> None:
    total = sum(map(len, documents))
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(Path(folder), documents, shard_tokens)
        if total <= row:
            with pytest.raises(TrainingError, match=f"the text has {total} tokens, too few for one row of {row}"):
                RowReader(stream, row)
            return
        reader = RowReader(stream, row)
        assert reader.rows == (total - 1) // row
        rows = data.draw(st.lists(st.integers(0, reader.rows - 1), min_size=1, max_size=5))
        batch = reader.batch(np.array(rows))
        assert cells(batch) == [cell for number in rows for cell in oracle(documents, row, number)]
        assert batch.row == row
        parts = (batch.tokens_T, batch.positions_T, batch.targets_T, batch.starts_D)
        assert all(part.dtype == torch.int64 and part.is_contiguous() for part in parts)


def rows_of(batch: Batch) -> list[int]:
    """Which rows it holds, when the stream counts up from zero."""
    return [int(first) // batch.row for first in batch.tokens_T[:: batch.row]]


@pytest.fixture
def reader(tmp_path: Path) -> RowReader:
    """Fifteen rows of four tokens that count up."""
    return RowReader(stream_of(tmp_path, [list(range(63))]), 4)


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own(reader: RowReader) -> None:
    batches = ShuffledRows(reader, 3, seed=5)
    epochs = [[row for number in range(5 * epoch, 5 * epoch + 5) for row in rows_of(batches[number])] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(15))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_may_span_two_epochs(reader: RowReader) -> None:
    long, short = ShuffledRows(reader, 4, seed=5), ShuffledRows(reader, 1, seed=5)
    for number in range(8):
        assert rows_of(long[number]) == [row for part in range(4) for row in rows_of(short[4 * number + part])]


def test_any_batch_can_be_made_alone(reader: RowReader) -> None:
    batches = ShuffledRows(reader, 2, seed=9)
    in_order = [rows_of(batches[number]) for number in range(40)]
    for number in (39, 0, 17, 3):
        assert rows_of(ShuffledRows(reader, 2, seed=9)[number]) == in_order[number]


def test_the_order_depends_on_the_seed_alone(reader: RowReader) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = [rows_of(ShuffledRows(reader, 2, seed=9)[number]) for number in range(7)]
    torch.manual_seed(2)
    np.random.seed(2)
    assert [rows_of(ShuffledRows(reader, 2, seed=9)[number]) for number in range(7)] == first
    assert [rows_of(ShuffledRows(reader, 2, seed=10)[number]) for number in range(7)] != first
