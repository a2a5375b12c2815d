"""One step's work, as the scheduler hands it to the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from lineshaft.sched.request import Request


class Chunk(msgspec.Struct, gc=False):
    """Tokens `first` up to `last` of one request, to be run in this step."""

    request: Request
    first: int
    last: int

    @property
    def ends(self) -> bool:
        """Is its last token the last that the request has? (Not when more of the prompt is to come.)"""
        return self.last == len(self.request.tokens)

    @property
    def samples(self) -> bool:
        """Does the request get a token from this step?"""
        return self.ends and self.request.task != "embed"


@dataclass(frozen=True)
class Plan:
    """What to copy first, then the tokens to run in the order in which they are packed."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(layer group, from page, to page): before a page that others hold too is written into. To be done in this order."""
    started: list[tuple[Request, int]] = field(default_factory=list)
    """Requests that no step has worked on before, and how many of their tokens were found in the cache."""

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token from this step."""
        return [chunk.request for chunk in self.chunks if chunk.samples]

    @property
    def sampling_rows(self) -> list[int]:
        """Where in the packed step the last token of each of these stands: its logits choose the next one."""
        rows, row = [], -1
        for chunk in self.chunks:
            row += chunk.last - chunk.first
            if chunk.samples:
                rows.append(row)
        return rows

    @property
    def tokens(self) -> int:
        """Tokens to run."""
        return sum(chunk.last - chunk.first for chunk in self.chunks)
