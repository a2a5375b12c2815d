"""Memory of the paged cache: given before tokens come, and no content changed by that."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import pytest
import torch

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.engine import page_memory
from lineshaft.engine.cache import PagedCache, page_bytes
from lineshaft.model.decoder import Decoder

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


def made(tiny: Callable[..., Decoder], mebibytes: int) -> PagedCache:
    config = tiny("mistral").config
    page = page_bytes(config, 16, torch.float32)
    return PagedCache(config, [(mebibytes << 20) // page], 16, torch.float32)


def test_the_first_pages_are_given_and_keep_what_they_hold(tiny: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_memory, "FIRST", 64 << 20)
    cache = made(tiny, 128)
    cache.parts[0][0][3] = 7.0
    before, niceness = resident_memory_bytes(), os.getpriority(os.PRIO_PROCESS, 0)
    cache.get_ready().join()
    grown = resident_memory_bytes() - before
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness  # of the thread alone
    assert (cache.parts[0][0][3] == 7).all()
    assert not cache.parts[0][0][4].any()
    if grown < 16 << 20:
        pytest.skip(f"this system (Linux {os.uname().release}) does not make memory ready on request")
    assert grown < 80 << 20  # no more than was asked for


def test_a_system_that_forbids_another_priority_is_no_obstacle(tiny: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    touched: list[int] = []
    monkeypatch.setattr(page_memory, "touch", lambda memory, size: touched.append(size))
    cache = made(tiny, 8)
    cache.get_ready().join()
    assert len(touched) == len(cache.parts) * len(cache.parts[0])
