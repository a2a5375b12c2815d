"""Which change is the smallest that makes a task fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lineshaft.base.errors import DoesNotFit
from lineshaft.model import fit
from lineshaft.model.fit import Verdict, halved, judge, smallest_change, told_bytes
from lineshaft.model.memory import Memory

Pair = tuple[int, int]


def left(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for value in halved(pair[0], 1):
        yield f"left={value}", (value, pair[1])


def right(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for value in halved(pair[1], 1):
        yield f"right={value}", (pair[0], value)


@pytest.mark.parametrize(
    ("room", "change"),
    [
        (14, ["left=4"]),
        (10, ["left=2"]),
        (9, ["left=1"]),
        (8, ["left=4", "right=4"]),
        (7, ["left=4", "right=2"]),
        (2, ["left=1", "right=1"]),
        (1, []),
    ],
)
def test_one_option_is_lowered_step_by_step_before_two_are_taken_together(room: int, change: list[str]) -> None:
    assert smallest_change((8, 8), (left, right), lambda pair: sum(pair) <= room) == change


def test_a_later_option_that_is_enough_alone_comes_before_two() -> None:
    assert smallest_change((2, 64), (left, right), lambda pair: sum(pair) <= 20) == ["right=16"]


def judged(room: int) -> Verdict:
    return judge("task", (8, 8), (left, right), lambda pair: Memory({"work": {"left": pair[0], "right": pair[1]}}), own=4, room=room)


def test_what_fits_needs_no_change() -> None:
    verdict = judged(20)
    assert (verdict.fits, verdict.needs, verdict.change) == (True, 20, [])
    verdict.enforce()


def test_what_does_not_fit_is_refused_with_its_terms_and_the_change() -> None:
    with pytest.raises(DoesNotFit, match=r"task: needs 20 bytes of memory \(.*left 8 bytes.*smallest change that fits: left=4$"):
        judged(16).enforce()


def test_what_can_never_fit_is_told_how_much_is_missing() -> None:
    with pytest.raises(DoesNotFit, match="no option makes it fit, it takes 15 bytes more memory"):
        judged(5).enforce()


def test_without_a_limit_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 10)
    monkeypatch.setattr(fit, "resident_memory_bytes", lambda: 4)
    verdict = judge("task", (8, 8), (left,), lambda pair: Memory({"work": {"both": sum(pair)}}), own=4)
    assert (verdict.room, verdict.fits, verdict.change) == (14, False, ["left=2"])


def test_bytes_are_told_in_binary_units() -> None:
    assert [told_bytes(count) for count in (12, 2048, 3 << 20, 5 << 29)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "2.5 GiB"]
