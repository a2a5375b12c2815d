"""Keeping a start, so that the next one needs no torch."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lineshaft.base.caches import is_ours
from lineshaft.base.files import sync_folder
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.starts.format import PROGRAM, Kept, write
from lineshaft.engine.starts.key import start_basis, start_key, starts_of
from lineshaft.engine.starts.places import Places, result_of
from lineshaft.engine.starts.sources import Sources
from lineshaft.engine.starts.weights import WEIGHTS
from lineshaft.ops.isa import library
from lineshaft.ops.recording import Recorded

MOST_STARTS = 8
"""Checkpoints whose starts are kept; the one that was used longest ago goes first."""
_STALE_S = 3600
"""After so long what is half written is left over from a process that has gone."""


@dataclass(frozen=True)
class Asked:
    """What a start hangs on. To be made before anything is read: what changes while it is loaded is noticed."""

    folder: Path
    config: EngineConfig
    """The settings by which it will be found."""
    basis: str

    @classmethod
    def now(cls, folder: Path, config: EngineConfig) -> Asked | None:
        """None where no start is to be kept, or it can't be said what it hangs on."""
        if config.keep_start == "nothing" or library() is None or sys.platform != "linux":
            return None
        with suppress(OSError):
            return cls(folder, config, start_basis(folder))
        return None

    @property
    def key(self) -> str:
        """See key.py."""
        return start_key(self.basis, self.config)


def keep(engine: Engine, asked: Asked | None, fingerprint: str, facts: dict[str, Any]) -> threading.Thread | None:
    """Keep the start of this engine in a thread of low priority. None where there is nothing to keep: steps are not recorded.

    `facts`: what `Reopened` is to give back.
    """
    native = engine.runner.native
    if asked is None or native is None or native.recorded is None:
        return None
    writer = _Writer(engine, native.recorded, asked, fingerprint, facts)
    thread = threading.Thread(target=writer.write, name="keeping the start", daemon=True)
    thread.start()
    return thread


class _Writer:
    def __init__(self, engine: Engine, recorded: Recorded, asked: Asked, fingerprint: str, facts: dict[str, Any]) -> None:
        self._engine, self._recorded, self._asked = engine, recorded, asked
        self._fingerprint, self._facts = fingerprint, facts

    def write(self) -> None:
        """What goes wrong is said; serving goes on."""
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            home = starts_of(self._asked.folder)
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (home / self._asked.key).exists():  # one that can't be used now is left
                self._write_beside(home)
        except (OSError, ValueError, RuntimeError) as error:
            say(f"this start is not kept, so the next one takes as long: {error}")

    def _write_beside(self, home: Path) -> None:
        """Into a folder that takes its place when all of it is on the disk."""
        key = self._asked.key
        draft = home / f".{key}-{os.getpid()}"
        draft.mkdir(mode=0o700)
        try:
            if not is_ours(draft):
                raise OSError(f"{draft}: others may write there, whatever mode it is given")
            self._write_into(draft)
            if start_basis(self._asked.folder) != self._asked.basis:
                raise ValueError("the checkpoint, or our own code, was changed meanwhile")
            draft.rename(home / key)
            sync_folder(home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            _tidy(home, key)

    def _write_into(self, draft: Path) -> None:
        places = Places(self._engine, self._recorded)
        calls = [(name, places.of_call(name, args)) for name, args in self._recorded.calls]
        hidden, logits = (result_of(tensor, places) for tensor in (self._recorded.output, self._recorded.finished))
        with (draft / WEIGHTS).open("xb") as weights:
            small = self._asked.config.keep_start == "program"
            sources = Sources(self._engine.model, self._asked.folder, draft, weights, small)
            regions = sources.traced(places.memory, places.regions)
            os.fsync(weights.fileno())
        native: Any = library()
        bounds = asdict(self._engine.bounds)
        kept = Kept(
            basis=self._asked.basis,
            key=self._asked.key,
            calls=calls,
            body=self._recorded.body,
            regions=regions,
            hidden=hidden,
            logits=logits,
            threads=native.threads(),
            config=self._engine.config.model_dump(mode="json"),
            crc=sources.crc,
            cache_asked=self._asked.config.cache_bytes is not None,
            bounds={**bounds, "ends": sorted(bounds["ends"])},
            pages=self._engine.cache.pages,
            token_bytes=self._engine.cache.token_bytes,
            fingerprint=self._fingerprint,
            facts=self._facts,
        )
        write(draft / PROGRAM, kept)


def _tidy(home: Path, key: str) -> None:
    """Other starts of the checkpoint go, and checkpoints that were not started for the longest time."""
    for path in home.iterdir():
        if path.name != key and (not path.name.startswith(".") or path.stat().st_mtime < time.time() - _STALE_S):
            shutil.rmtree(path, ignore_errors=True)
    os.utime(home)
    oldest: Sequence[Path] = sorted(home.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_STARTS]
    for path in oldest:
        shutil.rmtree(path, ignore_errors=True)
