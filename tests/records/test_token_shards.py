"""Token shards: one long row, opened without reading, each block checked when it is first touched."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base import files, manifest
from lineshaft.base.errors import Corrupt, StoreError
from lineshaft.base.files import BLOCK_BYTES, FileRecord
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.records import tokens as token_files
from lineshaft.records.corpus import Split
from lineshaft.records.tokens import SHARD_TOKENS, TokenStream, dtype_for, write_split


def written(folder: Path, splits: dict[Split, list[list[int]]], vocab_size: int = 1000, shard_tokens: int = SHARD_TOKENS) -> Artifact:
    store = Store(folder)
    with store.draft("tokens", stage="s", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        for split, documents in splits.items():
            counts = write_split(draft, split, iter(documents), vocab_size, shard_tokens)
            assert counts == {"tokens": sum(map(len, documents)), "documents": len(documents)}
    (made,) = store.all()
    return store.open(made.id)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=12),
    st.integers(1, 12),
    st.sampled_from([100, 70_000]),
    st.data(),
)
def test_the_stream_is_the_plain_concatenation(documents: list[list[int]], shard_tokens: int, vocab_size: int, data: st.DataObject) -> None:
    plain = [token for document in documents for token in document]
    starts = [sum(map(len, documents[:number])) for number in range(len(documents))]
    with tempfile.TemporaryDirectory() as folder:
        stream = TokenStream(written(Path(folder), {"train": documents, "heldout": [[7]]}, vocab_size, shard_tokens), "train")
        assert len(stream) == len(plain)
        assert stream.read(0, len(plain)).tolist() == plain
        assert stream.starts().tolist() == starts
        assert stream.read(0, 0).dtype == stream.starts().dtype == np.int64
        for _ in range(5):
            first = data.draw(st.integers(0, len(plain)))
            last = data.draw(st.integers(first, len(plain)))
            assert stream.read(first, last).tolist() == plain[first:last]


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (0, 4), (2, 1), (4, 4)])
def test_tokens_that_are_not_there_are_refused(tmp_path: Path, first: int, last: int) -> None:
    stream = TokenStream(written(tmp_path, {"train": [[1, 2, 3]]}), "train")
    with pytest.raises(StoreError, match="outside this split, which has 3"):
        stream.read(first, last)


def test_a_split_without_documents_is_an_empty_row(tmp_path: Path) -> None:
    tokens = written(tmp_path, {"train": [], "heldout": [[]]})
    for split in ("train", "heldout"):
        stream = TokenStream(tokens, split)
        assert (len(stream), stream.read(0, 0).tolist()) == (0, [])
    assert TokenStream(tokens, "heldout").starts().tolist() == [0]


@pytest.mark.parametrize(("vocab_size", "dtype", "bytes_a_token"), [(1, "uint16", 2), (65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_ids_take_the_narrowest_type_little_end_first(tmp_path: Path, vocab_size: int, dtype: str, bytes_a_token: int) -> None:
    assert dtype_for(vocab_size) == dtype
    tokens = written(tmp_path, {"train": [[0, vocab_size - 1]]}, vocab_size)
    raw = tokens.path("train-00000.bin").read_bytes()
    assert raw == bytes(bytes_a_token) + (vocab_size - 1).to_bytes(bytes_a_token, "little")
    assert tokens.path("train-00000.starts").read_bytes() == bytes(8)


def test_each_block_is_checked_once_at_first_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_block = BLOCK_BYTES // 2
    tokens = written(tmp_path, {"train": [[5] * (3 * per_block + 1)]})
    path = tokens.path("train-00000.bin")
    with path.open("r+b") as file:
        file.seek(2 * BLOCK_BYTES + 10)
        file.write(b"\xff")
    found = Store(tmp_path).find(tokens.id)
    assert found
    stream = TokenStream(found, "train")
    checked: list[int] = []
    plain_check = files.check_block
    monkeypatch.setattr(token_files, "check_block", lambda p, r, number, block: (checked.append(number), plain_check(p, r, number, block)))
    for first, last in ((0, per_block), (per_block - 1, per_block), (per_block - 1, per_block + 1), (3 * per_block, 3 * per_block + 1)):
        assert set(stream.read(first, last).tolist()) == {5}
    assert checked == [0, 1, 3]
    for first, last in ((2 * per_block, 2 * per_block + 1), (0, 3 * per_block)):  # refused again, not only the first time
        with pytest.raises(Corrupt, match=rf"^{re.escape(str(path))}: block 2 \("):
            stream.read(first, last)


def test_a_flipped_bit_in_the_starts_is_refused(tmp_path: Path) -> None:
    tokens = written(tmp_path, {"train": [[1], [2]]})
    tokens.path("train-00000.starts").write_bytes(bytes(7) + b"\x01" + bytes(8))
    with pytest.raises(Corrupt, match=r"train-00000\.starts: block 0"):
        TokenStream(tokens, "train").starts()


def test_a_large_shard_opens_in_no_time_and_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 MB of holes: opening maps it, and one read touches one block."""
    size, zero = 400 * BLOCK_BYTES, 0xA738EA1C  # CRC32 of 1 MiB of zeros
    for name, length in (("train-00000.bin", size), ("train-00000.starts", 8)):
        with (tmp_path / name).open("wb") as file:
            os.truncate(file.fileno(), length)
    small = files.record(tmp_path, "train-00000.starts")
    large = FileRecord(name="train-00000.bin", size=size, sha256="", crc32=[zero] * 400)
    fields = {"id": manifest.id_of("tokens", "0" * 64), "kind": "tokens", "stage": "s", "version": 1, "key": "0" * 64}
    fields |= {"config": {}, "inputs": {}, "parents": {}, "facts": {"dtype": "uint16"}}
    written_manifest = manifest.write(tmp_path, fields, {}, [large, small], [])
    touched: list[int] = []
    plain_check = files.check_block
    monkeypatch.setattr(token_files, "check_block", lambda p, r, number, block: (touched.append(number), plain_check(p, r, number, block)))
    started = time.perf_counter()
    stream = TokenStream(Artifact(tmp_path, written_manifest), "train")
    assert len(stream) == size // 2
    assert stream.read(size // 4, size // 4 + 10).tolist() == [0] * 10
    assert time.perf_counter() - started < 1
    assert touched == [200]
