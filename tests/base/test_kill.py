"""`kill -9` at every single step of making an artifact or moving a reference; see killed_at_every_step.py."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.base.store import Store

SCRIPT = Path(__file__).with_name("killed_at_every_step.py")
MAKE: Callable[[Store], bool] = runpy.run_path(str(SCRIPT))["make"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reruns here are hundreds; what a kill leaves does not depend on it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def killed_runs(folder: Path, what: str) -> list[int]:
    done = subprocess.run([sys.executable, SCRIPT, folder, what], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def build(store: Store) -> tuple[bool, str]:
    """What a rerun does: whether it had to build, and the digest it ends with."""
    built = MAKE(store)
    (made,) = store.all()
    return built, store.open(made.id).manifest.digest


@pytest.mark.parametrize("what", ["draft", "twice"])
def test_a_killed_run_leaves_a_whole_artifact_or_none_and_a_rerun_ends_the_same(tmp_path: Path, what: str) -> None:
    _, undisturbed = build(Store(tmp_path / "undisturbed"))
    runs = killed_runs(tmp_path, what)
    built_again = []
    for n in runs:
        store = Store(tmp_path / str(n))
        whole = [store.open(item.id).manifest.digest for item in store.all()]  # every byte of what is there is checked
        assert whole in ([], [undisturbed]), n
        built, digest = build(store)
        assert (built, digest) == (not whole, undisturbed), n
        assert not list((store.root / "work").iterdir()), n
        built_again.append(built)
    assert len(runs) > 25
    assert built_again == sorted(built_again, reverse=True)  # nothing until the rename, everything after it
    assert set(built_again) == {True, False}


def test_a_killed_move_of_a_reference_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    runs = killed_runs(tmp_path, "ref")
    seen = []
    for n in runs:
        store = Store(tmp_path / str(n))
        old, new = (item.id for item in store.all())
        assert store.refs() in ({"prod": old}, {"prod": new}), n
        seen.append(store.resolve("prod") == new)
        store.set_ref("prod", new)
        assert store.refs() == {"prod": new}
    assert seen == sorted(seen)
    assert set(seen) == {True, False}
