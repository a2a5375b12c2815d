"""The line in miniature, for every test of training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

import letter_line

from lineshaft.base.store import Artifact, Store


@pytest.fixture
def line(tmp_path: Path) -> tuple[Store, dict[str, Artifact]]:
    """A fresh store with tokenizer and tokens: `PRETRAIN(store, letter_line.config(), **parents)`."""
    return letter_line.parents(tmp_path / "store")
