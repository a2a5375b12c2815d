"""A finished run for the tests of the table and the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

from finished_run import finished
from tiny_line import Line, finished_line

from lineshaft.pipeline.outcome import Outcome


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A whole run with one compressed variant, and an answer that tries to break out; made once, since nobody writes to it."""
    return finished(tmp_path_factory.mktemp("run") / "store")


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A tiny line, run once by the command line; nobody writes to its store."""
    return finished_line(tmp_path_factory)
