"""What the whole suite shares: one hypothesis profile, and small artifacts to work on."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in child processes: tiny models lose by threads
os.environ["LINESHAFT_CACHE"] = tempfile.mkdtemp(prefix="lineshaft-tests-")  # not the user's; each process of the suite has its own
atexit.register(shutil.rmtree, os.environ["LINESHAFT_CACHE"], ignore_errors=True)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every child process compiles our code again, half a second each
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a suite started in the background: its children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lineshaft.base.store import Artifact, Store

settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def _make(store: Store, files: Mapping[str, bytes], kind: Any = "corpus", **ask: Any) -> Artifact:
    with store.draft(kind, **{"stage": "write", "version": 1, "config": {"text": "hello"}, **ask}) as draft:
        if isinstance(draft, Artifact):
            return draft
        for name, content in files.items():
            path = draft.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if name.startswith("aside/"):
                draft.aside_files.add(name)
        draft.facts["files"] = len(files)
        made = draft.root.parent.name
    found = store.find(made)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def make() -> Callable[..., Artifact]:
    """make(store, {name: bytes}, kind=..., stage=..., ...): an artifact; files named aside/... stay out of the digest."""
    return _make
