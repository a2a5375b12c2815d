"""A lock between processes that ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lineshaft.base.terminal import say

_held: set[int] = set()
"""Open locks of this process. A forked worker would share them and keep them alive after its parent was killed, so it
closes them at birth; the parent's own copy goes on holding the lock."""


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is made when it is missing and never removed. Waits for the holder, and says so."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    try:
        _take(handle, path)
        yield
    finally:
        if handle in _held:  # a forked child that leaves through here has closed it already
            _held.remove(handle)
            os.close(handle)


def _take(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{path.name}: another run is making it; waiting for that run")
        fcntl.flock(handle, fcntl.LOCK_EX)
