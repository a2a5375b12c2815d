"""Where the bytes come from that the calls of a kept start read. Free of torch."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lineshaft.base import pages
from lineshaft.base.mapped import MappedFile
from lineshaft.base.terminal import say
from lineshaft.ops.isa import library

WEIGHTS = "weights.bin"
LINE = 64
"""Bytes of a cache line, at whose multiples weights begin."""

Bytes = npt.NDArray[np.uint8]


class Region(msgspec.Struct, frozen=True):
    """Memory that calls name places in. `size`: bytes."""

    size: int
    kind: Literal["work", "buffer", "pages", "file", "dense", "own"]
    """work: what a step leaves; buffer: of StepBuffers, pages: of PageMemory, both the next one in their order; file: bytes of a
    checkpoint's file; dense: packed from such bytes; own: bytes of weights.bin."""
    file: str = ""
    offset: int = 0
    """In that file, or in weights.bin."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """Of what is packed: kind of numbers (packed.h), inputs, outputs."""


class Files:
    """A checkpoint's files, and weights.bin."""

    def __init__(self, folder: Path, root: Path) -> None:
        """`folder`: of the checkpoint. `root`: of the kept start."""
        self._folder, self._root = folder, root
        self._mapped: dict[str, Bytes] = {}
        self._own: MappedFile | None = None

    def weight(self, region: Region) -> Bytes:
        """A weight as the kernels read it. ValueError where it can't be what it was."""
        if region.kind == "own":
            return self._written(region)
        taken = pages.place(region.size)
        out = np.frombuffer(taken.memory, np.uint8, region.size, taken.offset)
        if region.kind == "file":
            out[:] = self._stored(region.file, region.offset, region.size)
            return out
        kind, inputs, outputs = region.shape
        native: Any = library()
        if native.packed_bytes(kind, inputs, outputs, 0, False) != region.size:
            raise ValueError(f"a weight of {outputs} x {inputs} does not pack to {region.size} bytes")
        source = self._stored(region.file, region.offset, inputs * outputs * (4 if kind == 0 else 2))
        native.pack_dense(kind, inputs, outputs, source.ctypes.data, inputs, out.ctypes.data)
        return out

    def move_in(self) -> int | None:
        """Move what is read in weights.bin into memory, if there is any left; zlib.crc32 of it. None where nothing is read there. OSError:
        see MappedFile.move_in."""
        if self._own is None:
            return None
        try:
            return self._own.move_in()
        except MemoryError as error:
            say(f"weights stay in pages of their file: {error}")
            return self._own.crc()

    def _written(self, region: Region) -> Bytes:
        """Where the file is mapped. It must outlive the array."""
        if self._own is None:
            self._own = MappedFile(self._root / WEIGHTS)
        if not 0 <= region.offset <= self._own.size - region.size:
            raise ValueError(f"{self._root / WEIGHTS} ends before byte {region.offset + region.size}")
        place = (ctypes.c_uint8 * region.size).from_address(self._own.address + region.offset)
        return np.frombuffer(memoryview(place), np.uint8)

    def _stored(self, name: str, offset: int, size: int) -> Bytes:
        if name not in self._mapped:
            with (self._folder / name).open("rb") as file:
                self._mapped[name] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        found = self._mapped[name][offset : offset + size]
        if len(found) != size:
            raise ValueError(f"{self._folder / name} ends before byte {offset + size}")
        return found
