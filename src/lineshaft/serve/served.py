"""What the server needs of an engine, wherever that runs: in a process of its own, or in this one for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Event
from lineshaft.text.tokenizer import Tokenizer


class Engine(Protocol):
    """One model at work. Used by one thread, but for `wake`."""

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer."""

    @property
    def idle(self) -> bool:
        """True when `step` has nothing to do."""

    def submit(self, ask: Ask) -> list[int]:
        """Take a request in; returns a number for each copy. Raises RequestError or Capacity."""

    def cancel(self, request: int) -> None:
        """Forget a request and free its pages."""

    def step(self) -> Sequence[Event]:
        """Do one round of work."""

    def load_now(self) -> Load:
        """How busy it is."""


class Remote(Engine, Protocol):
    """An engine elsewhere."""

    def wake(self) -> None:
        """Let a `step` that waits return at once. For any thread."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Served:
    """A loaded model."""

    engine: Engine
    tokenizer: Tokenizer
