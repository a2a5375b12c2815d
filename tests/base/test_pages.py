"""Memory made ready before it is wanted."""

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base import pages
from lineshaft.base.machine import resident_memory_bytes

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


@pytest.fixture(autouse=True)
def fresh():
    yield
    pages.leave_rest()


@given(ready=st.integers(0, 3 * pages.HUGE), sizes=st.lists(st.integers(0, pages.HUGE), max_size=8))
def test_places_are_zero_and_nobody_elses_whatever_was_made_ready(ready, sizes):
    pages.make_ready(ready)
    found = [pages.place(size) for size in sizes]
    pages.leave_rest()
    for number, (place, size) in enumerate(zip(found, sizes, strict=True)):
        assert place.offset % 64 == 0
        assert place.memory[place.offset : place.offset + size] == bytes(size)
        place.memory[place.offset : place.offset + size] = bytes([number + 1]) * size
    for number, (place, size) in enumerate(zip(found, sizes, strict=True)):
        assert place.memory[place.offset : place.offset + size] == bytes([number + 1]) * size


@linux
def test_what_was_made_ready_is_in_memory_until_it_is_left():
    size = 64 << 20
    before = resident_memory_bytes()
    pages.make_ready(size)
    if resident_memory_bytes() - before < size // 2:
        pytest.skip(f"this system (Linux {os.uname().release}) does not make memory ready on request")
    kept = pages.place(pages.HUGE)
    pages.leave_rest()
    assert resident_memory_bytes() - before < size // 4
    kept.memory[kept.offset] = 1
    assert pages.place(pages.HUGE).memory is not kept.memory


@linux
def test_touching_a_part_gives_that_part_and_changes_nothing():
    memory, size = pages.huge(64 << 20), 32 << 20
    memory[5] = 7
    before = resident_memory_bytes()
    pages.touch(memory, size)
    grown = resident_memory_bytes() - before
    if grown < size // 2:
        pytest.skip(f"this system (Linux {os.uname().release}) does not make memory ready on request")
    assert grown < size + 2 * pages.HUGE
    assert memory[:6] == bytes([0, 0, 0, 0, 0, 7])
    pages.touch(memory, 2 * len(memory))  # more than there is


@linux
def test_more_than_half_of_what_is_left_is_not_made_ready(monkeypatch):
    monkeypatch.setattr(pages, "available_memory_bytes", lambda: 4 * pages.HUGE)
    made = []
    monkeypatch.setattr(pages, "touch", lambda memory, size: made.append(size))
    pages.make_ready(3 * pages.HUGE)
    assert made == []
    pages.make_ready(2 * pages.HUGE)
    assert made == [2 * pages.HUGE]


def test_what_is_expected_and_cannot_be_read_is_left_for_loading_to_complain_about(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pages, "make_ready", made.append)
    pages.expect(tmp_path / "nothing", copied=True)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(500))
    pages.expect(tmp_path, copied=True)
    assert made == [0, 1500]
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    pages.expect(tmp_path, copied=True)
    assert made == [0, 1500]


def test_no_memory_is_made_ready_for_what_stays_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "make_ready", lambda _: pytest.fail("made ready"))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    pages.expect(tmp_path, copied=False)


@linux
def test_small_places_share_memory_and_so_lie_in_huge_pages():
    first, second = pages.place(pages.HUGE // 2), pages.place(pages.HUGE // 2)
    assert first.memory is second.memory
    assert first.offset + pages.HUGE // 2 <= second.offset
    assert pages.place(pages.SHARED).memory is not first.memory
