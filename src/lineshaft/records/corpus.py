"""A corpus: cleaned documents in Parquet, each in the training or the held-out part.

Payload: `documents-00000.parquet`, ... with the columns of `Document`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lineshaft.base.store import Artifact, Draft

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("split", pa.string()), ("text", pa.string())])
ROWS_A_GROUP = 4096
ROWS_A_FILE = 1 << 20


@dataclass(frozen=True)
class Document:
    """One cleaned text. `id` is the first 16 hex digits of its SHA-256, `source` says where it was read."""

    id: str
    source: str
    split: Split
    text: str


def write_corpus(draft: Draft, documents: Iterable[Document]) -> None:
    """Stream documents into the draft's Parquet files, in the order given."""
    writer: pq.ParquetWriter | None = None
    rows = 0
    for group in _groups(documents):
        if writer is None or rows >= ROWS_A_FILE:
            if writer:
                writer.close()
            number = len(list(draft.root.glob("documents-*.parquet")))
            writer, rows = pq.ParquetWriter(draft.root / f"documents-{number:05d}.parquet", SCHEMA, compression="zstd"), 0
        writer.write_table(pa.table({name: [getattr(item, name) for item in group] for name in SCHEMA.names}, schema=SCHEMA))
        rows += len(group)
    if writer:
        writer.close()


def read_corpus(corpus: Artifact, split: Split | None = None) -> Iterator[Document]:
    """The documents in the order they were written, of one split or of both."""
    for path in sorted(corpus.root.glob("documents-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_A_GROUP):
                for row in batch.to_pylist():
                    if split is None or row["split"] == split:
                        yield Document(**row)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == ROWS_A_GROUP:
            yield group
            group = []
    if group:
        yield group
