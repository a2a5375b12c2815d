"""One request to the engine: what was asked, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import msgspec
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config

Finish = Literal["stop", "length"]
Task = Literal["generate", "score", "embed"]
MOST_LOGPROBS = 20
"""Most alternatives that are told for a token."""
GONE = -1
"""In a page table: that page was given back, since no later token sees it."""


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
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Positive logits of tokens that prompt or answer hold are divided by it, negative ones multiplied (arXiv 1909.05858, section 4.1)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logit of every token that the answer holds already."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from a token's logit once for each time the answer holds it."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Token id to what is added to its logit."""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Tell the log-probability of each token, and those of so many of the likeliest; null: none are worked out."""


@dataclass(frozen=True)
class Ask:
    """What the engine is asked for: a prompt, and what is wanted of it."""

    prompt: list[int]
    sampling: Sampling
    task: Task = "generate"
    """`generate`: an answer. `score`: log-probabilities of the prompt's own tokens first, then an answer. `embed`: the mean of the
    prompt's final hidden states, and no answer."""
    priority: int = 0
    """Lower numbers are worked on first, as in vLLM; equal ones in order of arrival."""
    copies: int = 1
    """Answers to the same prompt, each a request of its own; the prompt is read once. With a seed, copy i has seed + i."""


class Score(msgspec.Struct, frozen=True):
    """How likely a token was, in nats, by the model's own logits (before temperature, penalties and bias)."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the likeliest, as many as were asked for, likeliest first; equal ones in order of their ids."""


class Emitted(msgspec.Struct, frozen=True, tag=True):
    """One token of an answer. `finish` is set on the last: "stop" when it is itself a stop token (not text), else "length"."""

    request: int
    token: int
    finish: Finish | None
    score: Score | None = None
    """Set when the request asked for log-probabilities."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The first step that works on a request is about to be run; comes before everything else, once a request."""

    request: int
    cached: int
    """Tokens of its prompt whose keys were found in the prefix cache."""


class PromptScored(msgspec.Struct, frozen=True, tag=True):
    """The prompt's own tokens, scored; comes before the answer's first token. One entry a token, None for the first."""

    request: int
    scores: list[Score | None]


class Pooled(msgspec.Struct, frozen=True, tag=True):
    """The embedding of a prompt: the mean of its final hidden states, not scaled to length one. The request has ended."""

    request: int
    embedding: list[float]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """An engine in another process could not take the request in (one in this process raises instead), or the model gave it no numbers to
    choose a token by. It has ended."""

    request: int
    error: str
    """Name of the class in base/errors.py."""
    message: str
    param: str | None = None


Event: TypeAlias = Started | Emitted | PromptScored | Pooled | Refused
"""What a request's owner is told. Every request ends with an Emitted that has a `finish`, with a Pooled, or with a Refused."""


def ends(event: Event) -> bool:
    """Is it the last that its request is told?"""
    return isinstance(event, Pooled | Refused) or (isinstance(event, Emitted) and event.finish is not None)


@dataclass(eq=False, slots=True)
class Request:
    """A request's state. Owned by the scheduler; others only read it."""

    number: int
    """Numbers ascend in order of arrival."""
    prompt_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    """Tokens that end the answer."""
    tokens: list[int]
    """Prompt, then answer."""
    task: Task = "generate"
    priority: int = 0
    parent: Request | None = None
    """The request of the same prompt whose pages this one takes over once the prompt is read; None when there is none, or no more."""
    arrived: float = 0.0
    """On the caller's clock, in seconds."""
    tables: list[list[int]] = field(default_factory=list)
    """For each layer group the cache pages held, in order of position; GONE where they were given back."""
    keys: list[bytes] = field(default_factory=list)
    """Names of the text up to the end of each full page, as far as they were needed."""
    published: int = 0
    """Pages that can be found by their key."""
    cached: int = 0
    """How many of `tokens` have their keys in those pages."""
    settled: bool = False
    """Nobody else holds the page that the next token goes into."""
    running: bool = False
    started: bool = False
    """A step has worked on it."""
    scored: bool = False
    """Its prompt's scores were told (task "score")."""

    @property
    def limit(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self.prompt_tokens + self.sampling.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Lower is served first."""
        return self.priority, self.number

    @property
    def reads_all(self) -> bool:
        """Must every token of the prompt be run, so that no prefix may be taken from the cache?"""
        return self.task == "embed" or (self.task == "score" and not self.scored)

    def finish_with(self, token: int) -> Finish | None:
        """Take one more token of the answer; is that its end?"""
        self.tokens.append(token)
        if token in self.stops:
            return "stop"
        return "length" if len(self.tokens) >= self.prompt_tokens + self.sampling.max_tokens else None
