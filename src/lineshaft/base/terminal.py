"""What people see while something runs: progress bars on a terminal, plain lines elsewhere, always on stderr.

Results go to stdout, so a command's output can be piped while its progress is watched.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0
"""Without a terminal, one line at most this often for each bar."""

console = Console(stderr=True, highlight=False, emoji=False)  # a model's or file's name may hold ":x:"


def say(text: str) -> None:
    """One line for the person who watches."""
    console.print(text, markup=False, soft_wrap=True)


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more as done; `note` is shown behind the bar."""


@contextmanager
def bar(label: str, total: int | None, *, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` steps (None: unknown), of which `done` were done in an earlier run."""
    if not console.is_terminal:
        plain = _PlainBar(label, total, done)
        yield plain
        plain.line()
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield _RichBar(progress, progress.add_task(label, total=total, completed=done, note=""))


@dataclass
class _RichBar:
    progress: Progress
    task: TaskID

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.progress.update(self.task, advance=steps, note=note)


@dataclass
class _PlainBar:
    label: str
    total: int | None
    done: int
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    fresh: int = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.fresh += steps
        self.note = note or self.note
        if time.monotonic() - self.printed >= PLAIN_EVERY_S:
            self.line()

    def line(self) -> None:
        self.printed = time.monotonic()
        spent = self.printed - self.started
        to_do = max((self.total or 0) - self.done, 0)
        left = f", {spent / self.fresh * to_do:.0f} s left" if self.fresh and to_do else ""
        of = f"/{self.total}" if self.total else ""
        print(f"{self.label}: {self.done}{of} {self.note} ({spent:.0f} s{left})", file=sys.stderr, flush=True)
