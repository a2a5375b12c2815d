"""An engine for the server from a start that was kept (engine/starts). Free of torch: see loading.py for the others.

Which start it will be hangs on settings that the server has yet to read. But as a rule a checkpoint has one, so that one is opened
ahead, while the server imports its web framework.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from lineshaft.base.errors import Corrupt
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.rounds import Rounds
from lineshaft.engine.starts import reopen
from lineshaft.engine.starts.reopen import Reopened
from lineshaft.serve.frames import Ready

_ahead: tuple[Path, Reopened | None] | None = None
"""What came of the start that was opened ahead, and where that is kept."""


def open_ahead(folder: Path) -> None:
    """Open the start that was kept for a checkpoint folder, if it is the only one, for `reopened` to give. Raises Corrupt."""
    global _ahead  # noqa: PLW0603 # of this process
    if (root := reopen.only_one(folder)) is not None:
        _ahead = root, reopen.reopened(folder, root)


def reopened(folder: Path, config: EngineConfig) -> tuple[Rounds, Ready] | None:
    """The engine, warm, and what the server is told of it; None where no start was kept that can be used. Raises Corrupt."""
    global _ahead  # of this process
    began, root = time.monotonic(), reopen.kept_for(folder, config)
    ahead, _ahead = _ahead, None
    if ahead and ahead[0] == root:
        found = ahead[1]
    else:
        ahead = None  # it goes first: both may not fit
        found = reopen.reopened(folder, root) if root else None
    if found is None:
        return None
    ready = msgspec.convert(found.facts, Ready)
    took = time.monotonic() - began
    ready.told.append(f"a start that was kept, asked for and ready in {took:.2f} s, its numbers tried (docs/serving.md)")
    found.engine.cache.get_ready()  # goes on beside the first requests, as does the next
    threading.Thread(target=_settle, args=(found,), name="moving weights in", daemon=True).start()
    return found.engine, ready


def _settle(found: Reopened) -> None:
    """What goes wrong ends the process, and what was kept is gone: the server tells everybody, and starts another engine."""
    with suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    try:
        found.settle()
    except (Corrupt, OSError) as error:
        shutil.rmtree(found.root, ignore_errors=True)
        say(f"{error}")
        sys.stderr.flush()
        os._exit(1)
