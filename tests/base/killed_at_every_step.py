"""A program that is killed (SIGKILL) just before the n-th thing it asks of the system or of a hash, for n = 1, 2, 3, ...
(every third n for `twice`, where an earlier run was killed as well)

    python killed_at_every_step.py FOLDER draft|twice|ref

Run n works on the store FOLDER/n. Prints the numbers of the runs that were killed; the next one finished.
Each run is a fork, so the interpreter starts once.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineshaft.base.store import Artifact, Store

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock", "shutil.rmtree"}
PAYLOAD = {"a.bin": b"0123456789" * 150_000, "deep/er/b.txt": b"hello", "aside/t": b"0.1 s", "empty": b""}
STAGE: dict[str, Any] = {"stage": "killed", "version": 1, "config": {"n": 1}}


class Countdown:
    """Kills this process when `step` was called `n` times."""

    def __init__(self, n: int) -> None:
        self.left = n

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Count system calls that Python announces, and the silent ones (fsync, and each block that is hashed)."""
        sys.addaudithook(lambda event, _: self.step() if event in EVENTS else None)
        for module, name in ((zlib, "crc32"), (os, "close")):
            setattr(module, name, self._before(getattr(module, name)))
        os.fsync = self._before(lambda _: None)  # a kill loses nothing that the system holds, so waiting for the disk proves nothing

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.step()
            return call(*args)

        return counted


def make(store: Store) -> bool:
    """The artifact under test: several files, folders, two blocks, a measurement, resumable state. True when it was built."""
    with store.draft("corpus", **STAGE) as draft:
        if isinstance(draft, Artifact):
            return False
        (draft.scratch / "state").write_bytes(b"step 1")
        for name, content in PAYLOAD.items():
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_bytes(content)
        draft.aside_files.add("aside/t")
        draft.facts["files"] = len(PAYLOAD)
    return True


def point(store: Store) -> None:
    """Move a reference from the first artifact of the store to the last."""
    store.set_ref("prod", [item.id for item in store.all()][-1])


def killed(folder: Path, work: Callable[[Store], object], n: int) -> bool:
    """Run `work` in a child that is killed at step `n`; False when it finished before that."""
    child = os.fork()
    if child == 0:
        Countdown(n).watch()
        work(Store(folder))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit(f"run {n} failed by itself")
    return False


def main(folder: Path, what: str) -> None:
    """Kill at every step until a run gets through."""
    runs = []
    for n in itertools.count(1, 3 if what == "twice" else 1):
        here = folder / str(n)
        store = Store(here)
        if what == "twice":  # an earlier run was killed in the middle of hashing, leaving its work behind
            assert killed(here, make, 40)
        elif what == "ref":
            for version in (1, 2):
                with store.draft("corpus", stage="s", version=version, config={}):
                    assert not store.refs()
            store.set_ref("prod", next(item.id for item in store.all()))
        if not killed(here, point if what == "ref" else make, n):
            print(json.dumps(runs))
            return
        runs.append(n)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
