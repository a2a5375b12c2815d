"""A finished run for the tests of the table and the page."""

from __future__ import annotations

import pytest
from finished_run import finished

from lineshaft.pipeline.outcome import Outcome


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A whole run with one compressed variant, and an answer that tries to break out; made once, since nobody writes to it."""
    return finished(tmp_path_factory.mktemp("run") / "store")
