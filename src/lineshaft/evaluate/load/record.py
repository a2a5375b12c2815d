"""What became of one request. `client` fills it, `measure` reads it.

Times are seconds from the beginning of the run. Every latency counts from `scheduled`, when the request was due, and not
from `sent`: a client that waits for a slow server before it sends would otherwise leave the waiting out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """One request from its schedule to its end."""

    number: int
    scheduled: float
    sent: float | None = None
    """When this client began to send; None while it has not."""
    tokens_at: list[float] = field(default_factory=list)
    """When each piece of text arrived; a piece is one token on most servers."""
    ended: float | None = None
    """When the answer was complete; None for one that failed or is under way."""
    prompt_tokens: int | None = None
    """As the server counted them."""
    counted_tokens: int | None = None
    """Tokens of the answer as the server counted them."""
    error: str | None = None
    """Kind of failure: `http 429`, `timeout`, `connection`, `cut off`, `in the stream`, `bad answer`, `client`."""
    detail: str = ""
    """What was said about the failure."""
    probe: int = 0
    """Number of the run within a search for the highest rate."""

    @property
    def answered(self) -> bool:
        """Whether the whole answer came."""
        return self.ended is not None and self.error is None

    @property
    def lag(self) -> float | None:
        """Seconds by which this client sent late."""
        return None if self.sent is None else max(0.0, self.sent - self.scheduled)

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: the server's count, else the pieces."""
        return len(self.tokens_at) if self.counted_tokens is None else self.counted_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds from schedule to the first piece of text."""
        return self.tokens_at[0] - self.scheduled if self.tokens_at else None

    @property
    def latency(self) -> float | None:
        """Seconds from schedule to the end of the answer."""
        return None if self.ended is None else self.ended - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring pieces of text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.tokens_at)]

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first; None for answers of one token."""
        if self.ended is None or not self.tokens_at or self.output_tokens < 2:
            return None
        return (self.tokens_at[-1] - self.tokens_at[0]) / (self.output_tokens - 1)

    def table(self, measured_from: float) -> dict[str, Any]:
        """A line of requests.jsonl. Requests that were due before `measured_from` are marked as warm-up."""
        return {
            "probe": self.probe,
            "number": self.number,
            "warmup": self.scheduled < measured_from,
            "scheduled": self.scheduled,
            "sent": self.sent,
            "tokens_at": self.tokens_at,
            "ended": self.ended,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "error": self.error,
            "detail": self.detail,
        }
