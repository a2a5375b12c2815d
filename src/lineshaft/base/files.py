"""Writing so that a crash leaves the old bytes or the new ones, and reading with a checksum for every block."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from lineshaft.base.config import Config
from lineshaft.base.errors import Corrupt, LineshaftError, StorageFull, StoreError

BLOCK_BYTES = 1 << 20
"""One CRC32 covers this many bytes: small enough to name the damaged place, large enough to keep manifests short."""

REMEDY = "restore the artifact from a copy, or delete it and run the stage again"
"""What to do about damaged bytes."""


class FileRecord(Config):
    """What a file must look like: size in bytes, SHA-256 of the whole, CRC32 of each block."""

    name: str
    size: int
    sha256: str
    crc32: list[int]

    @pydantic.model_validator(mode="after")
    def _is_possible(self) -> FileRecord:
        """A manifest may come from a stranger: it must not make us read outside its folder, or past its own list."""
        if not is_inside(self.name):
            raise ValueError(f'"{self.name}" is not a name below the artifact')
        if self.size < 0 or len(self.crc32) != -(-self.size // BLOCK_BYTES):
            raise ValueError(f'"{self.name}": {len(self.crc32)} block checksums do not fit {self.size} bytes')
        return self


def is_inside(name: str) -> bool:
    """Whether `name` is a plain relative path such as `part/a.bin`: no "..", no root, no NUL, written in one way only."""
    path = PurePosixPath(name)
    return name == str(path) and name not in ("", ".") and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def record(root: Path, name: str) -> FileRecord:
    """Read the file once and describe it."""
    crcs: list[int] = []
    size, sha256 = _read_through(root / name, lambda _, block: crcs.append(zlib.crc32(block)))
    return FileRecord(name=name, size=size, sha256=sha256, crc32=crcs)


def verify(root: Path, expected: FileRecord) -> None:
    """Read the file once; raises Corrupt that names the file and the first block that differs."""
    check_size(root, expected)
    path, read = root / expected.name, 0

    def look(number: int, block: memoryview) -> None:
        nonlocal read
        check_block(path, expected, number, block)
        read += 1

    try:
        _, sha256 = _read_through(path, look)
    except OSError as error:  # such as EIO of a dying disk
        raise Corrupt(f"{path}: block {read} can't be read: {error.strerror}; {REMEDY}") from error
    if sha256 != expected.sha256:
        raise Corrupt(f"{path}: every block matches its CRC32 but the file not its SHA-256: it was changed on purpose; {REMEDY}")


def _read_through(path: Path, look: Callable[[int, memoryview], None]) -> tuple[int, str]:
    """Size and SHA-256 of a file. `look` sees each block while the one before it is hashed on a second thread."""
    if path.stat().st_size < BLOCK_BYTES:
        return _read_at_once(path, look)
    sha, size, hashing = hashlib.sha256(), 0, None
    buffers = itertools.cycle([memoryview(bytearray(BLOCK_BYTES)) for _ in range(2)])
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
        for number, buffer in enumerate(buffers):
            block = buffer[: _fill(file, buffer)]
            if not block:
                break
            look(number, block)
            if hashing:
                hashing.result()  # its buffer is the next to be filled
            hashing = helper.submit(sha.update, block)
            size += len(block)
    return size, sha.hexdigest()


def _read_at_once(path: Path, look: Callable[[int, memoryview], None]) -> tuple[int, str]:
    """The same without the second thread and its buffers, which take tens of times as long as a small file."""
    whole = path.read_bytes()
    for number, start in enumerate(range(0, len(whole), BLOCK_BYTES)):
        look(number, memoryview(whole)[start : start + BLOCK_BYTES])
    return len(whole), hashlib.sha256(whole).hexdigest()


def check_block(path: Path, expected: FileRecord, number: int, block: bytes | memoryview) -> None:
    """Raises Corrupt unless `block` is block `number` of the file described by `expected`."""
    if number >= len(expected.crc32) or zlib.crc32(block) != expected.crc32[number]:
        first = number * BLOCK_BYTES
        raise Corrupt(
            f"{path}: block {number} (bytes {first} to {first + len(block) - 1}) is damaged: its CRC32 differs from the manifest; {REMEDY}"
        )


def check_size(root: Path, expected: FileRecord) -> None:
    """Raises Corrupt when the file is missing, is no plain file inside `root`, or has another size; reads nothing."""
    path = root / expected.name
    try:
        seen = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{path}: the manifest lists it but it is missing, from block 0 on; {REMEDY}") from None
    if not stat.S_ISREG(seen.st_mode) or not path.resolve().is_relative_to(root.resolve()):
        raise Corrupt(f"{path}: block 0 is not in this artifact, the name is a link to elsewhere or no plain file; {REMEDY}")
    if seen.st_size != expected.size:
        block = min(seen.st_size, expected.size) // BLOCK_BYTES
        raise Corrupt(f"{path}: block {block} is cut or grown: {seen.st_size} bytes where the manifest says {expected.size}; {REMEDY}")


def _fill(file: io.FileIO, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends, however little one read returns; the number of bytes."""
    filled = 0
    while filled < len(buffer) and (got := file.readinto(buffer[filled:])):
        filled += got
    return filled


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes, so they give equal hashes.

    Raises StoreError for what JSON can't hold: a number that is not finite, or text that is not Unicode.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        told = "numbers must be finite and text must be valid Unicode"
        raise StoreError(f"a config, fact or file name can't be stored: {error}; {told}") from None


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash it holds the old bytes or the new ones, on disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # two threads may write the same path
    with full_disk_told(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file below `folder`, and the folders themselves, durable."""
    for here, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(here) / name)
        sync_folder(Path(here))


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into an error that says where, and what to do."""
    try:
        yield
    except LineshaftError:
        raise
    except Exception as error:
        if not _says_full(error):
            raise
        told = "the disk is full; nothing was kept of this step. Free space, or name another store with --store"
        raise StorageFull(f"{path}: {told}") from error


def _says_full(error: Exception) -> bool:
    """Whether the system refused to write for lack of room. Rust writers (safetensors, tokenizers) keep the number in the text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)
