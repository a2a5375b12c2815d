"""One server on loopback for the tests that leave nothing behind."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

from fake_engine import FakeEngine
from world import serving


@pytest.fixture(scope="module")
def world():
    with serving(FakeEngine()) as running:
        yield running
