"""One request to the engine: what was asked, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PositiveInt

from lineshaft.base.config import Config

Finish = Literal["stop", "length"]


class Sampling(Config):
    """How the tokens of an answer are chosen."""

    max_tokens: PositiveInt = 16
    """Most tokens to produce."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Logits are divided by it; 0 always takes the most likely token."""
    top_k: int = Field(0, ge=0)
    """Choose among this many most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Choose among the most likely tokens that together reach this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the most likely one."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Equal seeds give equal answers; null: a fresh one."""
    stop_token_ids: list[int] = []
    """Any of these ends the answer, as the model's own end tokens do."""
    ignore_eos: bool = False
    """Go on past the model's end tokens (for measuring)."""


@dataclass(frozen=True)
class Emitted:
    """One token of an answer. `finish` is set on the last: "stop" when it is itself a stop token (not text), else "length"."""

    request: int
    token: int
    finish: Finish | None


@dataclass(eq=False)
class Request:
    """A request's state. Owned by the scheduler; others only read it."""

    number: int
    prompt_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    """Tokens that end the answer."""
    tokens: list[int]
    """Prompt, then answer."""
    pages: list[int] = field(default_factory=list)
    """Cache pages held, in order of position."""
    cached: int = 0
    """How many of `tokens` have their keys in those pages."""

    @property
    def limit(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self.prompt_tokens + self.sampling.max_tokens

    def finish_with(self, token: int) -> Finish | None:
        """Take one more token of the answer; is that its end?"""
        self.tokens.append(token)
        if token in self.stops:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
