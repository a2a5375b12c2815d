"""What a kept start (kept.py) hangs on, and where it lies: <cache>/starts/<checkpoint folder>/<key>. Free of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lineshaft
from lineshaft.base.caches import cache_root
from lineshaft.engine.config import EngineConfig
from lineshaft.ops.isa import FORCE, library

VERSION = 1
"""Of the files."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT", FORCE)


def starts_of(folder: Path) -> Path:
    """Where starts of a checkpoint folder are kept."""
    return cache_root() / "starts" / _digest(str(folder.resolve()))


def start_key(folder: Path, config: EngineConfig) -> str:
    """Equal when a start would come to the same: checkpoint, settings, code, processor and threads.

    Files count as the same while size, times and place on the disk are: a changed file has another time of change, whoever sets its
    other times back. Raises OSError where the checkpoint can't be looked at.
    """
    native: Any = library()
    return _digest(
        json.dumps(
            [
                VERSION,
                _stamps(path for path in folder.iterdir() if path.is_file()),
                config.model_dump(mode="json"),
                _stamps(_code()),
                sys.version,
                [native.chosen(), native.names(), len(os.sched_getaffinity(0))],
                {name: os.environ.get(name) for name in _THREADS},
            ]
        )
    )


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """Name, size, times of writing and of change, and number on the disk, of each file."""
    found = ((path.name, path.stat()) for path in sorted(paths))
    return [(name, it.st_size, it.st_mtime_ns, it.st_ctime_ns, it.st_ino) for name, it in found]


def _code() -> list[Path]:
    """Our own files, and one of torch's that a new version replaces."""
    own = [path for folder in lineshaft.__path__ for kind in ("*.so", "**/*.py") for path in Path(folder).glob(kind)]
    torch = importlib.util.find_spec("torch")
    return [*own, *([Path(torch.origin).parent / "version.py"] if torch and torch.origin else [])]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
