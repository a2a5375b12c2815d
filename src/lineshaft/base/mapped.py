"""A file's bytes at an address of this process, moved into huge pages while others read them. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
import zlib
from pathlib import Path

from lineshaft.base.pages import HUGE, touch

PIECE = 64 << 20
"""Bytes that are moved at a time."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
if sys.platform == "linux":
    _libc.mremap.restype = ctypes.c_void_p
    _libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_NONE, _READ, _PRIVATE, _FIXED, _ANONYMOUS = 0, mmap.PROT_READ, mmap.MAP_PRIVATE, 0x10, mmap.MAP_ANONYMOUS
_MAY_MOVE, _MOVE_TO = 1, 2
"""MREMAP_MAYMOVE and MREMAP_FIXED of <sys/mman.h>."""


class MappedFile:
    """`size` bytes from `address` on, where a huge page begins. They are the file's, so they are there without being read; a page of 4 KiB
    each, which costs some per cent of the speed at which weights stream by, until `move_in`."""

    def __init__(self, path: Path) -> None:
        """OSError for a file that can't be mapped, or is empty."""
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            length = self.size + 2 * HUGE  # to begin at a huge page, and to end at one
            base = _checked(_libc.mmap(None, length, _NONE, _PRIVATE | _ANONYMOUS, -1, 0))
            self.address = -(-base // HUGE) * HUGE
            weakref.finalize(self, _libc.munmap, base, length)
            _checked(_libc.mmap(self.address, self.size, _READ, _PRIVATE | _FIXED, file.fileno(), 0))

    def crc(self) -> int:
        """zlib.crc32 of all."""
        return zlib.crc32((ctypes.c_char * self.size).from_address(self.address))

    def move_in(self) -> int:
        """Copy all into memory of our own, piece by piece, and put each in the file's place: whoever reads meanwhile sees the same bytes.
        zlib.crc32 of what was copied.

        MemoryError where there is no more of it: then the rest stays the file's. After an OSError nothing may read here any more.
        """
        crc = 0
        for start in range(0, self.size, PIECE):
            size = min(PIECE, self.size - start)
            piece, whole = _reserved(size)
            ctypes.memmove(piece, self.address + start, size)
            crc = zlib.crc32((ctypes.c_char * size).from_address(piece), crc)
            _checked(_libc.mremap(piece, whole, whole, _MAY_MOVE | _MOVE_TO, self.address + start))
        return crc


def _reserved(size: int) -> tuple[int, int]:
    """Address and bytes of whole huge pages, given by the system now. Raises MemoryError."""
    whole = -(-size // HUGE) * HUGE
    try:
        first = _checked(_libc.mmap(None, whole + HUGE, _READ | mmap.PROT_WRITE, _PRIVATE | _ANONYMOUS, -1, 0))
    except OSError as error:
        raise MemoryError(f"{whole} bytes: {error.strerror}") from None
    piece = -(-first // HUGE) * HUGE
    for start, stop in ((first, piece), (piece + whole, first + whole + HUGE)):
        if stop > start:
            _libc.munmap(start, stop - start)
    _libc.madvise(ctypes.c_void_p(piece), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)
    touch(piece, whole)
    return piece, whole


def _checked(address: int | None) -> int:
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address
