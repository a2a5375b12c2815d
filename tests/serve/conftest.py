"""One server on loopback for the tests that leave nothing behind."""

import pytest
from fake_engine import FakeEngine
from world import serving


@pytest.fixture(scope="module")
def world():
    with serving(FakeEngine()) as running:
        yield running
