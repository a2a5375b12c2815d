"""Bytes of a file at an address: the file's, and the same while and after they are moved into memory of our own."""

from __future__ import annotations

import ctypes
import mmap
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from lineshaft.base import mapped
from lineshaft.base.mapped import MappedFile
from lineshaft.base.pages import HUGE

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


def written(path: Path, size: int) -> bytes:
    content = np.random.default_rng(size).bytes(size)
    path.write_bytes(content)
    return content


def bytes_at(file: MappedFile) -> bytes:
    return ctypes.string_at(file.address, file.size)


@pytest.mark.parametrize("size", [1, 4097, HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 77])
@pytest.mark.parametrize("piece", [HUGE, 2 * HUGE, mapped.PIECE])
def test_moved_bytes_are_those_of_the_file(tmp_path: Path, size: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PIECE", piece)
    content = written(tmp_path / "file", size)
    file = MappedFile(tmp_path / "file")
    assert file.address % HUGE == 0
    assert bytes_at(file) == content
    assert file.move_in() == zlib.crc32(content)
    assert bytes_at(file) == content
    with (tmp_path / "file").open("r+b") as changed:  # nothing is the file's any more
        changed.write(bytes(size))
    assert bytes_at(file) == content


def test_who_reads_meanwhile_sees_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PIECE", HUGE)
    written(tmp_path / "file", 24 * HUGE)
    file = MappedFile(tmp_path / "file")
    numbers = np.frombuffer(memoryview((ctypes.c_uint64 * (file.size // 8)).from_address(file.address)), np.uint64)
    wanted, moved, sums = int(numbers.sum()), threading.Event(), list[int]()

    def read() -> None:
        while not moved.is_set():
            sums.append(int(numbers.sum()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    file.move_in()
    moved.set()
    for reader in readers:
        reader.join()
    assert len(sums) > 1
    assert set(sums) == {wanted}


def test_where_there_is_no_memory_bytes_stay_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(tmp_path / "file", 3 * HUGE)
    file = MappedFile(tmp_path / "file")

    def none_left(size: int) -> tuple[int, int]:
        raise MemoryError(f"{size} bytes")

    monkeypatch.setattr(mapped, "_reserved", none_left)
    with pytest.raises(MemoryError):
        file.move_in()
    assert bytes_at(file) == content


def test_a_file_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(OSError, match=r".+"):
            MappedFile(tmp_path / name)
