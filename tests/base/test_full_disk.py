"""A real full disk: a small tmpfs, mounted for the test."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from pyarrow import parquet

from lineshaft.base.errors import StorageFull
from lineshaft.base.files import full_disk_told, write_atomic
from lineshaft.base.store import Artifact, Store

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk can't be mounted here, which takes root: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def write_text(root: Path) -> None:
    (root / "big.txt").write_text("a" * 5 * MIB)


def write_parquet(root: Path) -> None:
    parquet.write_table(pa.table({"a": np.random.default_rng(0).random(MIB)}), root / "big.parquet")


def write_safetensors(root: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(5 * MIB, np.uint8)}, root / "big.safetensors")


@pytest.mark.parametrize("write", [write_text, write_parquet, write_safetensors])
def test_a_draft_that_does_not_fit_is_told_in_words_and_gives_its_room_back(
    make: Callable[..., Artifact], small_disk: Path, write: Callable[[Path], None]
) -> None:
    store = Store(small_disk / "store")
    earlier = make(store, {"a": b"1" * MIB})
    request: dict[str, Any] = {"stage": "big", "version": 1, "config": {}}
    with pytest.raises(StorageFull, match=f"{store.root}: the disk is full.*Free space"), store.draft("corpus", **request) as draft:
        assert not isinstance(draft, Artifact)
        write(draft.root)
    assert [store.open(item.id).id for item in store.all()] == [earlier.id]
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize > 2.5 * MIB
    assert make(store, {"a": b"1" * 2 * MIB}, **request).manifest.files[0].size == 2 * MIB


def test_a_disk_that_fills_up_at_the_manifest_keeps_nothing_half(make: Callable[..., Artifact], small_disk: Path) -> None:
    store = Store(small_disk / "store")
    request: dict[str, Any] = {"stage": "big", "version": 1, "config": {}}
    filler = small_disk / "filler"
    with pytest.raises(StorageFull), store.draft("corpus", **request) as draft:
        assert not isinstance(draft, Artifact)
        (draft.root / "a").write_bytes(b"1")
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
    assert not list(store.all())
    assert not list((store.root / "work").iterdir())
    filler.unlink()
    assert store.open(make(store, {"a": b"1"}, **request).id)


def test_a_file_that_is_replaced_keeps_its_old_bytes_when_the_disk_is_full(small_disk: Path) -> None:
    path = small_disk / "prod"
    write_atomic(path, b"old")
    with pytest.raises(StorageFull, match="prod: the disk is full"):
        write_atomic(path, bytes(5 * MIB))
    assert path.read_bytes() == b"old"
    assert [item.name for item in small_disk.iterdir()] == ["prod"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_used_up_quota_counts_as_full_and_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(StorageFull), full_disk_told(tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(StorageFull), full_disk_told(tmp_path):
        raise RuntimeError("No space left on device (os error 28)")  # how Rust libraries tell it
    for other in (PermissionError(errno.EACCES, "no"), RuntimeError("os error 280"), ValueError("28")):
        with pytest.raises(type(other)), full_disk_told(tmp_path):
            raise other
