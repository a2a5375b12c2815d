"""A tiny trained checkpoint and its tokens, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "train"))  # pytest's importlib mode does not find helpers

import letter_line

from lineshaft.base.store import Artifact, Store
from lineshaft.evaluate import speed, stage
from lineshaft.train.stage import PRETRAIN


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("evaluate") / "store")


@pytest.fixture(scope="session")
def parents(store: Store) -> dict[str, Artifact]:
    """What EVALUATE works from."""
    _, made = letter_line.parents(store.root)
    return {"checkpoint": PRETRAIN(store, letter_line.config(steps=40, rows=4), **made), "tokens": made["tokens"]}


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured in this process: a fresh one, which test_speed.py is about, imports for seconds."""
    monkeypatch.setattr(stage, "measure", speed._run)
