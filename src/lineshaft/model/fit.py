"""Does a task fit into memory, and if not, what is the smallest change that makes it fit. Free of torch.

Options are tried one at a time, in the order in which a task lists them (what changes no answer comes first), each in
steps from small to large; only when none is enough alone are they taken together, each no further than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lineshaft.base.errors import DoesNotFit
from lineshaft.base.machine import available_memory_bytes, resident_memory_bytes
from lineshaft.model.memory import Memory

S = TypeVar("S")
Step = tuple[str, S]
"""What to do, in words, and the setting that results."""
Ladder = Callable[[S], Iterable[Step[S]]]
"""The steps of one option from a setting, the smallest first."""


def smallest_change(setting: S, ladders: Sequence[Ladder[S]], fits: Callable[[S], bool]) -> list[str]:
    """What to do so that the setting fits; [] when nothing that the tool offers is enough."""
    for ladder in ladders:
        for told, changed in ladder(setting):
            if fits(changed):
                return [told]
    taken = [len(list(ladder(setting))) for ladder in ladders]
    if not fits(_climbed(setting, ladders, taken)[1]):
        return []
    for place in range(len(ladders)):  # all options at their ends are enough: step back on each as far as that remains so
        for steps in range(taken[place]):
            fewer = [*taken[:place], steps, *taken[place + 1 :]]
            if fits(_climbed(setting, ladders, fewer)[1]):
                taken = fewer
                break
    return _climbed(setting, ladders, taken)[0]


def _climbed(setting: S, ladders: Sequence[Ladder[S]], taken: Sequence[int]) -> tuple[list[str], S]:
    """What to do, and the setting after so many steps on each ladder, or to its end where it has become shorter."""
    words: list[str] = []
    for ladder, count in zip(ladders, taken, strict=True):
        steps = list(ladder(setting))[:count]
        if steps:
            words.append(steps[-1][0])
            setting = steps[-1][1]
    return words, setting


@dataclass(frozen=True)
class Verdict:
    """What a task needs beside what there is."""

    task: str
    own: int
    """Bytes of the process itself: interpreter, PyTorch, our code."""
    memory: Memory
    room: int
    """Bytes that the process may come to hold."""
    change: list[str]
    """What makes it fit; empty when it fits, and when nothing does."""

    @property
    def needs(self) -> int:
        """Bytes at the peak."""
        return self.own + self.memory.total

    @property
    def fits(self) -> bool:
        """Is there room?"""
        return self.needs <= self.room

    @property
    def advice(self) -> str:
        """What to do when it does not fit."""
        if self.change:
            return ", and ".join(self.change)
        return f"no option makes it fit, it takes {told_bytes(self.needs - self.room)} more memory"

    def enforce(self) -> None:
        """Raises DoesNotFit, naming the largest terms and the smallest change, before anything is loaded."""
        if not self.fits:
            terms = {"process": self.own, **self.memory.phases[self.memory.peak]}
            largest = sorted(terms.items(), key=lambda item: -item[1])[:3]
            shown = ", ".join(f"{name} {told_bytes(count)}" for name, count in largest)
            need = f"needs {told_bytes(self.needs)} of memory ({shown}), {told_bytes(self.room)} can be had"
            raise DoesNotFit(f"{self.task}: {need}; smallest change that fits: {self.advice}")


def judge(task: str, setting: S, ladders: Sequence[Ladder[S]], memory: Callable[[S], Memory], own: int, room: int | None = None) -> Verdict:
    """Work out what `setting` needs and, where that is too much, what to change.

    `own`: bytes of a process that has loaded what the task needs, without model and data. `room`: bytes that it may come to
    hold; None: what is free here and what this process holds already.
    """
    room = available_memory_bytes() + resident_memory_bytes() if room is None else room
    needed = memory(setting)

    def fits(changed: S) -> bool:
        return own + memory(changed).total <= room

    change = [] if own + needed.total <= room else smallest_change(setting, ladders, fits)
    return Verdict(task, own, needed, room, change)


def halved(value: int, least: int) -> Iterable[int]:
    """Half of it, a quarter and so on, down to `least`."""
    while value // 2 >= max(1, least):
        value //= 2
        yield value


def told_bytes(count: int) -> str:
    """A number of bytes for people, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
