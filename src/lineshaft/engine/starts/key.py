"""What a kept start hangs on, and where it lies: <cache>/starts/<checkpoint folder>/<key>. Free of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
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


def any_kept(folder: Path) -> list[Path]:
    """The starts that are kept for a checkpoint folder, as a rule one; none where the cache can't be looked at."""
    with suppress(OSError, RuntimeError):
        return [path for path in starts_of(folder).iterdir() if not path.name.startswith(".")]
    return []


def start_basis(folder: Path) -> str:
    """Equal when a kept program means the same: checkpoint, code, processor and threads. It must not be run where it does not.

    Files count as the same while size, times and place on the disk are: a changed file has another time of change, whoever sets its
    other times back. Raises OSError where the checkpoint can't be looked at.
    """
    native: Any = library()
    return _digest(
        [
            VERSION,
            _stamps(path for path in folder.iterdir() if path.is_file()),
            _stamps(_code()),
            sys.version,
            [native.chosen(), native.names(), len(os.sched_getaffinity(0))],
            {name: os.environ.get(name) for name in _THREADS},
        ]
    )


def start_key(basis: str, config: EngineConfig) -> str:
    """Equal when the settings are, too."""
    return _digest([basis, config.model_dump(mode="json")])


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """Name, size, times of writing and of change, and number on the disk, of each file."""
    found = ((path.name, path.stat()) for path in sorted(paths))
    return [(name, it.st_size, it.st_mtime_ns, it.st_ctime_ns, it.st_ino) for name, it in found]


def _code() -> list[Path]:
    """Our own files, and one of torch's that a new version replaces."""
    own = [path for folder in lineshaft.__path__ for kind in ("*.so", "**/*.py") for path in Path(folder).glob(kind)]
    torch = importlib.util.find_spec("torch")
    return [*own, *([Path(torch.origin).parent / "version.py"] if torch and torch.origin else [])]


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
