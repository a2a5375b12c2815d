"""When requests arrive: constant, Poisson, a ramp, or a recorded trace. Called by `bench` before anything is sent.

Pure functions of the configuration and the seed. Times are seconds from the beginning of the run, ascending. Nothing here
knows how long an answer takes: that is what makes the load open-loop.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError

Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
"""Requests a second."""


@dataclass(frozen=True)
class Arrival:
    """One request to come. What a trace leaves open (None) the workload fills in."""

    at: float
    """Seconds from the beginning of the run."""
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    prompt: str | None = None


class Constant(Config):
    """Equal gaps: the first request at 0, the next after 1 / rate seconds."""

    kind: Literal["constant"] = "constant"
    rate: Rate = 1.0
    """Requests a second."""

    def expected(self, seconds: float) -> float:
        """Mean number of arrivals before `seconds`."""
        return self.rate * seconds

    def arrivals(self, seconds: float, seed: int) -> list[Arrival]:
        """All arrivals before `seconds`; the seed changes nothing."""
        return [Arrival(number / self.rate) for number in range(math.ceil(seconds * self.rate * (1 - 1e-12)))]


class Poisson(Config):
    """Independent users: gaps are exponential with a mean of 1 / rate seconds."""

    kind: Literal["poisson"] = "poisson"
    rate: Rate = 1.0
    """Mean requests a second."""

    def expected(self, seconds: float) -> float:
        """See Constant."""
        return self.rate * seconds

    def arrivals(self, seconds: float, seed: int) -> list[Arrival]:
        """All arrivals before `seconds`; equal seeds give equal ones."""
        return [Arrival(float(mass) / self.rate) for mass in _unit_poisson(self.expected(seconds), seed)]


class Ramp(Config):
    """Independent users whose number climbs and falls again, as on a sale day: base, climb, peak, descent, base."""

    kind: Literal["ramp"] = "ramp"
    rate: Rate = 1.0
    """Mean requests a second before and after the ramp."""
    factor: float = Field(6.0, gt=1, le=1000)
    """The peak's rate over the base's; real services see 5 to 8."""
    climb_share: float = Field(0.1, ge=0, le=0.5)
    """Share of the time in which the rate climbs in a straight line, and again in which it falls; 0 is a jump."""
    peak_share: float = Field(0.3, ge=0, le=1)
    """Share of the time at the peak. What is left is spent at the base, half of it before and half after."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Ramp:
        if 2 * self.climb_share + self.peak_share > 1 + 1e-9:
            raise ValueError("climb_share twice and peak_share together exceed 1")
        return self

    def knots(self, seconds: float) -> list[tuple[float, float]]:
        """Corners of the rate as (time, requests a second); between them it is a straight line."""
        calm, climb = max(0.0, 1 - 2 * self.climb_share - self.peak_share) / 2 * seconds, self.climb_share * seconds
        high = self.rate * self.factor
        corners = [(0.0, self.rate), (calm, self.rate), (calm + climb, high)]
        return corners + [(seconds - at, rate) for at, rate in reversed(corners)]

    def expected(self, seconds: float) -> float:
        """See Constant."""
        return self.rate * seconds * (1 + (self.factor - 1) * (self.climb_share + self.peak_share))

    def arrivals(self, seconds: float, seed: int) -> list[Arrival]:
        """See Poisson. Arrivals of rate 1 are bent: each falls where the integral of the rate reaches its place."""
        knots = self.knots(seconds)
        found, begin, piece = [], 0.0, 0
        for mass in _unit_poisson(self.expected(seconds), seed):
            while piece < len(knots) - 2 and mass > begin + _area(knots[piece], knots[piece + 1]):
                begin += _area(knots[piece], knots[piece + 1])
                piece += 1
            at = _where(knots[piece], knots[piece + 1], float(mass) - begin)
            if at < seconds:  # the last may be rounded onto the end
                found.append(Arrival(at))
        return found


class Trace(Config):
    """Replay of what was once recorded: JSON Lines with `at` and, if known, `prompt_tokens`, `max_tokens`, `prompt`."""

    kind: Literal["trace"] = "trace"
    path: str
    """The file. `at` is in seconds and never falls from line to line; the first line's is where the run begins."""
    speed: Rate = 1.0
    """2 replays at twice the speed."""

    def span(self) -> float:
        """Seconds from the first request to where one more would be due, at the mean gap; 1 where there is no gap."""
        lines = read_trace(Path(self.path))
        length = (lines[-1].at - lines[0].at) / self.speed
        return length * len(lines) / (len(lines) - 1) if length > 0 else 1.0

    def expected(self, seconds: float) -> float:
        """See Constant; here exact."""
        return len(self.arrivals(seconds, 0))

    def arrivals(self, seconds: float, seed: int) -> list[Arrival]:
        """Those before `seconds`. Raises ConfigError with the number of a line that can't be read."""
        lines = read_trace(Path(self.path))
        first = lines[0].at
        moved = [Arrival((line.at - first) / self.speed, line.prompt_tokens, line.max_tokens, line.prompt) for line in lines]
        return [line for line in moved if line.at < seconds]


Arrivals = Annotated[Constant | Poisson | Ramp | Trace, Field(discriminator="kind")]


class _Line(pydantic.BaseModel):
    """A line of a trace; what else stands in it is left alone, as recordings carry more."""

    model_config = pydantic.ConfigDict(strict=True)

    at: float = Field(ge=0, allow_inf_nan=False)
    prompt_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    prompt: str | None = Field(None, min_length=1)


def read_trace(path: Path) -> list[Arrival]:
    """A trace file's lines, blank ones left out. Raises ConfigError naming the line at fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8, so not a trace in JSON Lines") from None
    found: list[Arrival] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        read = _line(line, f"{path}, line {number}")
        if found and read.at < found[-1].at:
            raise ConfigError(f'{path}, line {number}: "at" is {read.at:g}, before the line above ({found[-1].at:g})')
        found.append(Arrival(read.at, read.prompt_tokens, read.max_tokens, read.prompt))
    if not found:
        raise ConfigError(f"{path}: holds no request")
    return found


def _line(line: str, where: str) -> _Line:
    try:
        table: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    try:
        return _Line.model_validate(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = f'"{first["loc"][0]}": ' if first["loc"] else ""
        raise ConfigError(f"{where}: {place}{first['msg']}") from None


def _unit_poisson(total: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Arrivals of rate 1 on [0, total)."""
    chance = np.random.default_rng([seed, 1])
    places = np.cumsum(chance.exponential(size=int(total + 10 * math.sqrt(total) + 20)))  # 10 deviations: never too few
    return places[places < total]


def _area(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[0] - left[0]) * (left[1] + right[1]) / 2


def _where(left: tuple[float, float], right: tuple[float, float], mass: float) -> float:
    """The time at which the integral of the rate from `left` on is `mass`.

    With rate a + s t that is the root of s t^2 / 2 + a t = mass, written so that s = 0 is no special case.
    """
    wide = right[0] - left[0]
    slope = (right[1] - left[1]) / wide if wide > 0 else 0.0
    root = math.sqrt(max(0.0, left[1] ** 2 + 2 * slope * mass))
    return left[0] + min(wide, 2 * mass / (left[1] + root))
