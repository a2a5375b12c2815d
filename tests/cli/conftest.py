"""What the tests of the command line share with those of the pipeline: a tiny line, run once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))  # pytest's importlib mode does not find helpers

from tiny_line import Line, finished_line


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A tiny line, run once by the command line; nobody writes to its store."""
    return finished_line(tmp_path_factory)
