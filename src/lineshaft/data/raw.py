"""What readers hand on: raw documents, and notes on how they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Raw:
    """One document as found. `source` is its file and row, or its module path; never an absolute path."""

    source: str
    text: str
    defect: str | None = None
    """Why it could not be read, such as `malformed_json`; its text is then empty."""


@dataclass
class Noticed:
    """What readers found out on the way; goes into the corpus' facts."""

    encodings: Counter[str] = field(default_factory=Counter)
    """Files by encoding."""
    text_columns: Counter[str] = field(default_factory=Counter)
    """Files by the column that was read."""


class Source(Protocol):
    """Something that documents are read from."""

    name: str
    """For people; the same on every machine that has the same content."""
    skipped: Counter[str]
    """Files that were passed over, by extension."""

    def digest(self) -> str:
        """SHA-256 over everything that `read` depends on. Sources of different kinds never agree."""

    def read(self, noticed: Noticed) -> Iterator[Raw]:
        """The documents, in an order that depends on content and names only."""
