"""An engine for the server from a start that was kept. Free of torch: see loading.py for the others."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from lineshaft.engine import kept
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.rounds import Rounds
from lineshaft.serve.frames import Ready


def reopened(folder: Path, config: EngineConfig) -> tuple[Rounds, Ready] | None:
    """The engine, warm, and what the server is told of it; None where no start was kept that can be used. Raises Corrupt."""
    began = time.monotonic()
    found = kept.reopened(folder, config)
    if found is None:
        return None
    ready = msgspec.convert(found.facts, Ready)
    ready.told[-1] = f"a start that was kept, loaded and warm in {time.monotonic() - began:.2f} s, its numbers tried (docs/serving.md)"
    found.engine.cache.get_ready()  # goes on beside the first requests
    return found.engine, ready
