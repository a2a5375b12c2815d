"""Random checkpoints written by transformers, made once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

from toys import Theirs, written_by_transformers


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Theirs]:
    """theirs(name of a toy): its folder and its model, shared by all tests: write to neither."""
    made: dict[str, Theirs] = {}

    def get(name: str) -> Theirs:
        if name not in made:
            made[name] = written_by_transformers(name, tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return get
