"""A corpus: cleaned documents in Parquet, each in the training or the held-out part.

Payload: `documents-00000.parquet`, ... with the columns of `Document`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lineshaft.base.errors import SourceError
from lineshaft.base.store import Artifact, Draft

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("split", pa.string()), ("text", pa.string())])
ROWS_A_GROUP = 4096
ROWS_A_FILE = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One cleaned text. `id` is the first 16 hex digits of its SHA-256, `source` says where it was read."""

    id: str
    source: str
    split: Split
    text: str


def write_corpus(draft: Draft, documents: Iterable[Document]) -> None:
    """Stream documents into the draft's Parquet files, in the order given. Raises SourceError for text that is not Unicode."""
    groups = _groups(documents)
    for number in itertools.count():
        head = next(groups, None)
        if head is None:
            return
        path = draft.root / f"documents-{number:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for group in itertools.chain([head], itertools.islice(groups, ROWS_A_FILE // ROWS_A_GROUP - 1)):
                writer.write_table(_table(group))


def _table(group: list[Document]) -> pa.Table:
    try:
        return pa.table({name: [getattr(item, name) for item in group] for name in SCHEMA.names}, schema=SCHEMA)
    except UnicodeEncodeError:
        bad = next(item for item in group if _SURROGATE.search(item.text + item.source + item.id + item.split))
        raise SourceError(
            f"{bad.source!a}: document {bad.id!a} holds half a surrogate pair, which is not text: repair or drop it"
        ) from None


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
