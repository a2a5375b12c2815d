"""Bytes that changed after they were written: every load refuses them and names the file and the block."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base import files, manifest
from lineshaft.base.errors import Corrupt, NotFound
from lineshaft.base.files import BLOCK_BYTES, FileRecord
from lineshaft.base.store import Artifact, Store

FILES = {"a.bin": bytes(range(256)) * 9000, "deep/b.txt": "读 \x7f\n".encode() * 100, "aside/t": b"0.1", "one": b"x", "empty": b""}
EVERY = sorted([*(name for name in FILES if FILES[name]), manifest.FILE_NAME])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make: Callable[..., Artifact]) -> tuple[Store, Artifact]:
    """An artifact with two and a bit blocks, a folder, floats that JSON writes with an exponent, escapes and Chinese."""
    store = Store(tmp_path_factory.mktemp("damage") / "store")
    config = {"lr": 1e-05, "big": 1e22, "third": 0.30000000000000004, "bell": "\x1b\x7f", "text": "好", "list": [1, -1, None, True, {}]}
    return store, make(store, FILES, config=config)


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file holds `content` for a while; it has its old bytes back afterwards."""
    kept = path.read_bytes()
    try:
        path.write_bytes(content)
        yield
    finally:
        path.write_bytes(kept)


def refused(store: Store, artifact: Artifact, path: Path, block: int) -> None:
    with pytest.raises(Corrupt, match=rf"^{re.escape(str(path))}: .*\bblock {block}\b|^{re.escape(str(path))}: block {block}\b"):
        store.open(artifact.id)


@settings(max_examples=50)
@given(st.sampled_from(EVERY), st.integers(min_value=0), st.integers(0, 7))
def test_one_flipped_bit_is_refused_naming_file_and_block(whole: tuple[Store, Artifact], name: str, place: int, bit: int) -> None:
    store, artifact = whole
    path = artifact.path(name)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] ^= 1 << bit
    with changed(path, bytes(content)):
        refused(store, artifact, path, place // BLOCK_BYTES)
    assert store.open(artifact.id).manifest == artifact.manifest


def test_every_single_bit_of_the_manifest_is_guarded(whole: tuple[Store, Artifact]) -> None:
    """Among them bits that leave the meaning as it is: 1e-05 or 1E-05, u001b or u001B, the 17th digit of a float."""
    store, artifact = whole
    path = artifact.path(manifest.FILE_NAME)
    kept = path.read_bytes()
    handle = os.open(path, os.O_RDWR)
    try:
        for place in range(len(kept)):
            for bit in range(8):
                os.pwrite(handle, bytes([kept[place] ^ 1 << bit]), place)
                with pytest.raises(Corrupt, match=r"manifest\.json: block 0"):
                    manifest.read(artifact.root)
            os.pwrite(handle, kept[place : place + 1], place)
    finally:
        os.close(handle)
    assert store.open(artifact.id)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("change", [lambda old: old[:-1], lambda old: old + b"\n", lambda old: b"", lambda old: old[: len(old) // 2]])
def test_a_cut_or_grown_file_is_refused(whole: tuple[Store, Artifact], name: str, change: Callable[[bytes], bytes]) -> None:
    store, artifact = whole
    path = artifact.path(name)
    new = change(path.read_bytes())
    with changed(path, new):
        refused(store, artifact, path, 0 if name == manifest.FILE_NAME else min(len(new), len(FILES[name])) // BLOCK_BYTES)
        with pytest.raises(Corrupt):
            store.find(artifact.id)  # sizes and manifest are checked even there


def copied(whole: tuple[Store, Artifact], tmp_path: Path) -> tuple[Store, Artifact]:
    shutil.copytree(whole[0].root, tmp_path / "store")
    store = Store(tmp_path / "store")
    return store, store.open(whole[1].id)


def test_missing_swapped_and_replaced_files_are_refused(
    whole: tuple[Store, Artifact], tmp_path: Path, make: Callable[..., Artifact]
) -> None:
    store, artifact = copied(whole, tmp_path)
    one, text = artifact.path("one"), artifact.path("deep/b.txt")
    one.rename(tmp_path / "one")
    refused(store, artifact, one, 0)
    one.mkdir()
    refused(store, artifact, one, 0)
    one.rmdir()
    one.symlink_to(tmp_path / "one")  # the right bytes, but not in here
    refused(store, artifact, one, 0)
    one.unlink()
    (tmp_path / "one").rename(one)
    text.parent.rename(tmp_path / "deep")
    refused(store, artifact, text, 0)
    text.parent.write_bytes(b"")
    refused(store, artifact, text, 0)
    text.parent.unlink()
    (tmp_path / "deep").rename(text.parent)
    assert store.open(artifact.id)
    other = make(store, FILES, version=2)
    for root, away in ((other.root, tmp_path / "x"), (artifact.root, other.root), (tmp_path / "x", artifact.root)):
        root.rename(away)
    refused(store, artifact, artifact.path(manifest.FILE_NAME), 0)


def test_an_artifact_without_its_manifest_is_damaged_not_absent(whole: tuple[Store, Artifact], tmp_path: Path) -> None:
    store, artifact = copied(whole, tmp_path)
    artifact.path(manifest.FILE_NAME).unlink()
    for load in (store.open, store.find, lambda _: list(store.all())):
        with pytest.raises(Corrupt, match=r"manifest\.json\): block 0"):
            load(artifact.id)
    shutil.rmtree(artifact.root)
    with pytest.raises(NotFound):
        store.open(artifact.id)


def test_a_file_that_was_put_there_later_is_refused_unless_hidden(whole: tuple[Store, Artifact], tmp_path: Path) -> None:
    store, artifact = copied(whole, tmp_path)
    for extra in ("model-00002.safetensors", "deep/c"):
        artifact.path(extra).write_bytes(b"")
        with pytest.raises(Corrupt, match=f"{extra}: no block"):
            store.open(artifact.id)
        artifact.path(extra).unlink()
    artifact.path(".DS_Store").write_bytes(b"x")
    artifact.path(".cache").mkdir()
    artifact.path(".cache/file").write_bytes(b"x")
    assert store.open(artifact.id)


def resealed(artifact: Artifact, **changes: Any) -> bytes:
    """A manifest made by someone who knows how: digest and seal fit what it says."""
    content = json.loads(artifact.path(manifest.FILE_NAME).read_bytes()) | changes
    hashed = {key: value for key, value in content.items() if key not in ("digest", "aside", "aside_files", "seal")}
    content["digest"] = files.digest(hashed)
    content["seal"] = files.digest({key: value for key, value in content.items() if key != "seal"})
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def test_resealing_alone_changes_nothing(whole: tuple[Store, Artifact]) -> None:
    assert resealed(whole[1]) == whole[1].path(manifest.FILE_NAME).read_bytes()


@pytest.mark.parametrize("name", ["../x", "..", "/etc/passwd", "a/../../x", "", ".", "a//b", "./a", "a/", "a\0b", manifest.FILE_NAME])
@pytest.mark.parametrize("where", ["files", "aside_files"])
def test_a_hostile_name_in_a_manifest_is_never_followed(
    whole: tuple[Store, Artifact], name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, artifact = whole
    record = {"name": name, "size": 0, "sha256": "", "crc32": []}
    opened: list[Path] = []
    monkeypatch.setattr(files, "_read_through", lambda path, _: opened.append(path))
    with changed(artifact.path(manifest.FILE_NAME), resealed(artifact, **{where: [record]})):
        refused(store, artifact, artifact.path(manifest.FILE_NAME), 0)
    assert not opened


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "corpus-0123456789abcdef"},
        {"format": 2},
        {"kind": "weights"},
        {"files": [{"name": "one", "size": 1, "sha256": "", "crc32": []}]},
        {"files": [{"name": "one", "size": -1, "sha256": "", "crc32": []}]},
        {"files": [{"name": "empty", "size": 0, "sha256": "", "crc32": []}] * 2},
        {"surprise": 1},
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(whole: tuple[Store, Artifact], changes: dict[str, Any]) -> None:
    store, artifact = whole
    with changed(artifact.path(manifest.FILE_NAME), resealed(artifact, **changes)):
        refused(store, artifact, artifact.path(manifest.FILE_NAME), 0)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"{}", b'{"seal": 1}', b"[" * 100_000, b'{"seal": "\\ud800"}', b"\xff\xfe", b"1" * 5000]
)
def test_a_manifest_that_is_something_else_is_refused(whole: tuple[Store, Artifact], text: bytes) -> None:
    store, artifact = whole
    with changed(artifact.path(manifest.FILE_NAME), text):
        refused(store, artifact, artifact.path(manifest.FILE_NAME), 0)


@given(st.binary(max_size=300), st.integers(1, 7))
def test_a_record_does_not_depend_on_how_much_one_read_returns(tmp_path_factory: pytest.TempPathFactory, content: bytes, most: int) -> None:
    class Short:
        """A file of which one read returns at most a few bytes, as on a network."""

        def __init__(self) -> None:
            self.left = content

        def readinto(self, into: memoryview) -> int:
            part, self.left = self.left[: min(most, len(into))], self.left[min(most, len(into)) :]
            into[: len(part)] = part
            return len(part)

    buffer = memoryview(bytearray(100))
    file, got = Short(), b""
    while filled := files._fill(file, buffer):
        assert filled == 100 or len(got) + filled == len(content)
        got += bytes(buffer[:filled])
    assert got == content


@given(st.integers(0, 3 * BLOCK_BYTES + 1))
def test_a_record_has_one_checksum_a_block(size: int) -> None:
    blocks = len(range(0, size, BLOCK_BYTES))
    assert FileRecord(name="a", size=size, sha256="", crc32=[0] * blocks).size == size
    with pytest.raises(ValueError, match="block checksums"):
        FileRecord(name="a", size=size, sha256="", crc32=[0] * (blocks + 1))


def test_a_disk_that_can_not_be_read_is_told_by_file_and_block(whole: tuple[Store, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    store, artifact = whole
    plain, calls = files._fill, iter(range(100))

    def dying(file: Any, buffer: memoryview) -> int:
        if next(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return plain(file, buffer)

    monkeypatch.setattr(files, "_fill", dying)
    with pytest.raises(Corrupt, match=r"/a\.bin: block 2 can't be read: Input/output error"):
        store.open(artifact.id)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 9 * BLOCK_BYTES - 1])
def test_a_record_is_what_hashlib_and_zlib_say(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    crc32 = [zlib.crc32(content[first : first + BLOCK_BYTES]) for first in range(0, size, BLOCK_BYTES)]
    record = files.record(tmp_path, "a")
    assert record == FileRecord(name="a", size=size, sha256=hashlib.sha256(content).hexdigest(), crc32=crc32)
    files.verify(tmp_path, record)
