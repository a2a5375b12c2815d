"""Memory in huge pages, and some of it made ready before it is wanted.

The system gives memory when it is first touched. In a virtual machine whose host has taken unused memory back that was
measured at 0.5 to 2 s a GiB, 13 to 50 times what writing it again takes. So a process that will need so much can have it
touched while it still imports its libraries.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lineshaft.base.machine import available_memory_bytes

HUGE = 2 << 20
SHARED = 64 << 20
"""Bytes of a mapping that small places share; what nobody took of it is never touched."""
_LINE = 64
"""Bytes of a cache line, at whose multiples places begin."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14 and later."""


@dataclass(frozen=True)
class Place:
    """Bytes of a mapping, which lives as long as somebody uses one of its places."""

    memory: mmap.mmap
    offset: int


class _Stock:
    def __init__(self, size: int) -> None:
        self.memory, self.used = huge(size), 0


    def take(self, size: int) -> Place | None:
        if self.used + size > len(self.memory):
            return None
        place = Place(self.memory, self.used)
        self.used += -(-size // _LINE) * _LINE
        return place


_stock: _Stock | None = None
_lock = threading.RLock()
"""Of it: a start may be kept while another thread takes places."""


def make_ready(size: int) -> None:
    """Have so many bytes touched now, by this thread, for `place` to give. Nothing where it is more than half of what is left."""
    global _stock  # noqa: PLW0603 # of this process
    if hasattr(mmap, "MADV_HUGEPAGE") and HUGE <= size <= available_memory_bytes() // 2:
        stock = _Stock(size)
        touch(stock.memory, size)
        _stock = stock


def touch(memory: mmap.mmap | int, size: int) -> None:
    """Have the system give the first `size` bytes of a mapping, or from an address on, now; what they hold stays. Where it can't, memory
    is given when it is used.

    Other threads run meanwhile, which mmap.madvise would not let them.
    """
    if not isinstance(memory, int):
        size, memory = min(size, len(memory)), ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CDLL(None).madvise(ctypes.c_void_p(memory), ctypes.c_size_t(size), _POPULATE_WRITE)


def place(size: int) -> Place:
    """Zero bytes that nobody else has: of what was made ready, else new ones. Small places share a mapping, which then has huge pages."""
    global _stock  # noqa: PLW0603 # of this process
    with _lock:
        if _stock is not None and (found := _stock.take(size)):
            return found
        if size > SHARED // 4:
            return Place(huge(size), 0)
        leave_rest()
        _stock = _Stock(SHARED)
        found = _stock.take(size)
        assert found is not None
        return found


def leave_rest() -> None:
    """Give back what was made ready and is not used."""
    global _stock  # noqa: PLW0603 # of this process
    with _lock:
        if _stock is not None:
            first = -(-_stock.used // HUGE) * HUGE
            if first < len(_stock.memory):
                _stock.memory.madvise(mmap.MADV_DONTNEED, first)
            _stock = None


def expect(folder: Path, copied: bool) -> None:
    """Have the system read a checkpoint's files while this process does something else, and make as much memory ready if they are `copied`.

    What can't be read is left for loading to complain about.
    """
    have_read(folder)
    if copied:
        with suppress(OSError):
            make_ready(sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def have_read(folder: Path) -> None:
    """Have the system read a checkpoint's files."""
    with suppress(OSError):
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def huge(size: int) -> mmap.mmap:
    """Whole huge pages where the system gives them: fewer look-ups of addresses while weights stream by."""
    pages = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
