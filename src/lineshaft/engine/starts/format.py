"""What a kept start is on the disk.

program.msgpack    CRC32, then the calls, with places for addresses; where each place's bytes come from; what the engine must know
weights.bin        weights as the kernels read them: all, or those that can't be packed anew from the checkpoint
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from lineshaft.base.files import sync_folder
from lineshaft.engine.starts.weights import Region

PROGRAM = "program.msgpack"
_CRC_BYTES = 4


class Place(msgspec.Struct, frozen=True):
    """An address: so many bytes into a region."""

    region: int
    offset: int


class Result(msgspec.Struct, frozen=True):
    """An array that the program leaves: rows of so many numbers."""

    place: Place
    rows: int
    width: int
    dtype: Literal["float32", "uint16"]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.width * np.dtype(self.dtype).itemsize


class Kept(msgspec.Struct, frozen=True):
    """What program.msgpack holds."""

    basis: str
    key: str
    """See key.py; the folder is named by the key."""
    calls: list[tuple[str, list[Any]]]
    """A function of the library and its arguments, Places for addresses (isa.STEP_CALLS)."""
    body: int
    """Calls before those that make logits."""
    regions: list[Region]
    hidden: Result
    logits: Result
    threads: int
    config: dict[str, Any]
    """Settings of the engine, with what was settled when it was loaded."""
    cache_asked: bool
    """The size of its cache was asked for, not settled."""
    bounds: dict[str, Any]
    pages: list[int]
    token_bytes: list[int]
    crc: int
    """zlib.crc32 of weights.bin."""
    fingerprint: str
    """Of the first tokens' logits (engine/warm.py)."""
    facts: dict[str, Any]
    """What whoever asked for the engine was told of it."""


def write(path: Path, kept: Kept) -> None:
    """CRC32, then MessagePack; on the disk when this returns."""
    body = msgspec.msgpack.encode(kept)
    path.write_bytes(zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body)
    sync_folder(path)


def read(path: Path) -> Kept:
    """What `write` wrote. Raises ValueError for anything else."""
    content = path.read_bytes()
    if zlib.crc32(content[_CRC_BYTES:]) != int.from_bytes(content[:_CRC_BYTES], "little"):
        raise ValueError(f"{path} is damaged")
    return msgspec.msgpack.decode(content[_CRC_BYTES:], type=Kept)
