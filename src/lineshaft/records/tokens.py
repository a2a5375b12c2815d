"""Token shards: documents as one long row of token ids, with the place where each begins.

Payload, for each split: `<split>-00000.bin`, the ids as little-endian uint16 (vocabularies up to 65536) or uint32, and
`<split>-00000.starts`, the offset of each document's first token in that shard as little-endian uint64. Every document
is bos + text + eos. Facts: `dtype`, and for each split `tokens`, `documents` and `bytes` (UTF-8 bytes of the text).

Opening maps the files and reads nothing, so it takes the same time whatever their size; a block is checked against its
CRC32 when it is first touched.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lineshaft.base.errors import StoreError
from lineshaft.base.files import BLOCK_BYTES, FileRecord, check_block
from lineshaft.base.store import Artifact, Draft
from lineshaft.records.corpus import Split

SHARD_TOKENS = 1 << 26
Ids = npt.NDArray[np.int64]


class CheckedFile:
    """A mapped file of fixed-size items that checks each block the first time one of its items is read."""

    def __init__(self, root: Path, record: FileRecord, dtype: npt.DTypeLike) -> None:
        self._path, self._record = root / record.name, record
        self._bytes: Any = np.memmap(self._path, np.uint8, "r") if record.size else np.empty(0, np.uint8)
        self._items = self._bytes.view(np.dtype(dtype))
        self._checked = np.zeros(len(record.crc32), bool)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, first: int, last: int) -> Ids:
        """Items `first` up to `last` as int64. Raises Corrupt naming file and block."""
        size = self._items.itemsize
        for number in range(first * size // BLOCK_BYTES, -(-last * size // BLOCK_BYTES)):
            if not self._checked[number]:
                block = self._bytes[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                check_block(self._path, self._record, number, block.data)
                self._checked[number] = True
        return np.asarray(self._items[first:last], dtype=np.int64)


class TokenStream:
    """All tokens of one split as one row; random access by position."""

    def __init__(self, tokens: Artifact, split: Split) -> None:
        records = {item.name: item for item in tokens.manifest.files}
        names = sorted(name for name in records if name.startswith(f"{split}-") and name.endswith(".bin"))
        dtype = np.dtype(tokens.manifest.facts["dtype"]).newbyteorder("<")
        self._shards = [CheckedFile(tokens.root, records[name], dtype) for name in names]
        self._starts = [CheckedFile(tokens.root, records[name.replace(".bin", ".starts")], "<u8") for name in names]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def read(self, first: int, last: int) -> Ids:
        """Tokens `first` up to `last`; shard borders do not show."""
        if not 0 <= first <= last <= len(self):
            raise StoreError(f"tokens {first} to {last} are outside this split, which has {len(self)}")
        parts = []
        while first < last:
            shard = bisect.bisect_right(self._ends, first)
            base = self._ends[shard] - len(self._shards[shard])
            upto = min(last, self._ends[shard])
            parts.append(self._shards[shard].read(first - base, upto - base))
            first = upto
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def starts(self) -> Ids:
        """Position of the first token of every document, ascending."""
        firsts = [end - len(shard) for end, shard in zip(self._ends, self._shards, strict=True)]
        parts = [file.read(0, len(file)) + first for file, first in zip(self._starts, firsts, strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def write_split(
    draft: Draft, split: Split, documents: Iterable[list[int]], vocab_size: int, shard_tokens: int = SHARD_TOKENS
) -> dict[str, int]:
    """Write documents, each a list of ids, as shards of about `shard_tokens`; returns the counts."""
    dtype = np.dtype(dtype_for(vocab_size)).newbyteorder("<")
    counts = {"tokens": 0, "documents": 0}
    shard, starts, number = bytearray(), [0], 0

    def flush() -> None:
        nonlocal number
        stem = draft.root / f"{split}-{number:05d}"
        stem.with_suffix(".bin").write_bytes(shard)
        stem.with_suffix(".starts").write_bytes(np.asarray(starts[:-1], "<u8").tobytes())
        shard.clear()
        starts[:] = [0]
        number += 1

    for ids in documents:
        shard += np.asarray(ids, dtype).tobytes()
        starts.append(len(shard) // dtype.itemsize)
        counts["tokens"] += len(ids)
        counts["documents"] += 1
        if starts[-1] >= shard_tokens:
            flush()
    if len(starts) > 1 or number == 0:
        flush()
    draft.facts["dtype"] = dtype_for(vocab_size)
    return counts


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
