"""What each request asks: a prompt and how many tokens to answer. Called by `bench` for one request after the other.

Pure functions of configuration, seed and the request's number, so that a prompt is made when it is about to be sent and
long ones need not all lie in memory. Prompts are token ids where the server takes them, because then their length is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.evaluate.load.arrivals import Arrival

Generator = np.random.Generator
_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power hour"
)
_WORDS = _COMMON.split()


class Fixed(Config):
    """Always the same number of tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: PositiveInt
    """Tokens."""

    def draw(self, chance: Generator, count: int) -> list[int]:
        """`count` lengths in tokens."""
        return [self.tokens] * count


class Uniform(Config):
    """Every length from lowest to highest equally often."""

    kind: Literal["uniform"] = "uniform"
    lowest: PositiveInt
    """Fewest tokens."""
    highest: PositiveInt
    """Most tokens."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.lowest > self.highest:
            raise ValueError("lowest exceeds highest")
        return self

    def draw(self, chance: Generator, count: int) -> list[int]:
        """See Fixed."""
        return [int(tokens) for tokens in chance.integers(self.lowest, self.highest, count, endpoint=True)]


class LogNormal(Config):
    """Many short and a few long ones, as people write: the logarithm of the length is normal."""

    kind: Literal["lognormal"] = "lognormal"
    median: PositiveInt
    """Tokens that half of the requests stay below."""
    sigma: float = Field(0.8, gt=0, le=4)
    """Standard deviation of the logarithm; at 0.8 one in ten is 2.8 times the median or more."""
    highest: PositiveInt
    """Longer ones are cut to this many tokens, so that they fit the model's context."""

    def draw(self, chance: Generator, count: int) -> list[int]:
        """See Fixed."""
        drawn = chance.lognormal(math.log(self.median), self.sigma, count)
        return [max(1, min(self.highest, round(float(tokens)))) for tokens in drawn]


def _from_number(value: Any) -> Any:
    """`128` is short for a fixed length of 128."""
    return {"kind": "fixed", "tokens": value} if isinstance(value, int) else value


Length = Annotated[Fixed | Uniform | LogNormal, Field(discriminator="kind"), pydantic.BeforeValidator(_from_number)]


class Workload(Config):
    """The requests' contents."""

    prompts: Literal["ids", "text"] = "ids"
    """`ids` sends token ids, whose number is exact (vLLM, lineshaft, llama.cpp); `text` sends words, about a token each."""
    prompt_tokens: Length = Fixed(tokens=128)
    """Tokens of a prompt: a number, or a table of kind uniform or lognormal."""
    output_tokens: Length = Fixed(tokens=32)
    """Tokens of an answer: a number, or a table of kind uniform or lognormal."""
    ignore_eos: bool = True
    """Ask for all output tokens, past the end token. A field of vLLM's; servers that refuse it need false."""
    temperature: float = Field(0.0, ge=0, le=2)
    """0 takes the most likely token."""
    shared_share: float = Field(0.0, ge=0, le=1)
    """Share of the requests whose prompts begin alike, as with one system prompt; measures a server's prefix cache."""
    shared_tokens: int = Field(0, ge=0)
    """Tokens that those have in common at their start, as far as their prompts are long enough."""
    text_file: str | None = None
    """Words of `text` prompts are taken from this file, neighbouring ones; by default from a list of common English words."""
    lowest_id: int = Field(100, ge=0)
    """Smallest token id that is sent; lower ones are often special."""
    highest_id: PositiveInt = 249
    """Largest token id that is sent; small enough for any vocabulary."""

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Workload:
        if self.lowest_id > self.highest_id:
            raise ValueError("lowest_id exceeds highest_id")
        if (self.shared_share > 0) != (self.shared_tokens > 0):
            raise ValueError("shared_share and shared_tokens mean something only together")
        return self


@dataclass(frozen=True)
class Ask:
    """One request's content."""

    prompt: str | list[int]
    max_tokens: int


class Asks:
    """The contents of a run's requests, each made when it is asked for, the same however often."""

    def __init__(self, workload: Workload, arrivals: Sequence[Arrival], seed: int) -> None:
        self._workload, self._arrivals, self._seed = workload, arrivals, seed
        chance = np.random.default_rng([seed, 2])
        self._prompts = workload.prompt_tokens.draw(chance, len(arrivals))
        self._outputs = workload.output_tokens.draw(chance, len(arrivals))
        self._shares = [bool(draw < workload.shared_share) for draw in chance.random(len(arrivals))]

    def __getitem__(self, number: int) -> Ask:
        arrival = self._arrivals[number]
        tokens = self._outputs[number] if arrival.max_tokens is None else arrival.max_tokens
        if arrival.prompt is not None:
            return Ask(arrival.prompt, tokens)
        length = self._prompts[number] if arrival.prompt_tokens is None else arrival.prompt_tokens
        shared = min(length, self._workload.shared_tokens) if self._shares[number] else 0
        return Ask(self._prompt(length, shared, np.random.default_rng([self._seed, 3, number])), tokens)

    def trial(self) -> Ask:
        """A short request for a first look at the server. Its prompt is no other's, so that it warms no prefix cache."""
        length = self._workload.prompt_tokens.draw(np.random.default_rng([self._seed, 4]), 1)[0]
        return Ask(self._prompt(length, 0, np.random.default_rng([self._seed, 5])), 1)

    def _prompt(self, length: int, shared: int, chance: Generator) -> str | list[int]:
        if self._workload.prompts == "ids":
            return self._common_ids[:shared] + self._ids(length - shared, chance)
        return " ".join(self._common_words[:shared] + self._some_words(length - shared, chance))

    def _ids(self, count: int, chance: Generator) -> list[int]:
        drawn: list[int] = chance.integers(self._workload.lowest_id, self._workload.highest_id, count, endpoint=True).tolist()
        return drawn

    def _some_words(self, count: int, chance: Generator) -> list[str]:
        if not self._workload.text_file:
            return [_WORDS[place] for place in chance.integers(0, len(_WORDS), count)]
        start = int(chance.integers(0, len(self._words)))
        return [self._words[(start + step) % len(self._words)] for step in range(count)]

    @cached_property
    def _common_ids(self) -> list[int]:
        return self._ids(self._workload.shared_tokens, np.random.default_rng([self._seed, 6]))

    @cached_property
    def _common_words(self) -> list[str]:
        return self._some_words(self._workload.shared_tokens, np.random.default_rng([self._seed, 6]))

    @cached_property
    def _words(self) -> list[str]:
        path = Path(str(self._workload.text_file))
        try:
            words = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8 text") from None
        if not words:
            raise ConfigError(f"{path}: holds no words")
        return words
