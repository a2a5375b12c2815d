"""Which format each part of a model gets so that it takes at most so many bytes and the damage is least. Exact; free of torch.

One option a unit, bytes and damages add up: the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
chapter 11). Units are added one after another to the Pareto frontier of those before (Nemhauser and Ullmann, Management Science 15,
1969): of two partial choices the one that takes no fewer bytes and does no less damage can be dropped, whatever follows.

A frontier of unlike units can grow without bound, so `allocate` also drops what can't win. For a price of p nats a byte each unit costs
at least m = min(damage + p bytes). A choice within the budget B does damage D >= sum(damage + p bytes) - p B, so one that
is to beat a known choice of damage D' may lose at most D' + p B - sum(m) against the m of its units. With the price at which the units'
own cheapest options just fit, that is less than what one unit's step to its next format is worth, and few partial choices are left.
No bound holds for every case (the problem is NP-hard): 300 units of four formats and unlike sizes were seen to take under a second.

Shape letters: F choices on a frontier, U units, K options of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lineshaft.base.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROUNDING = 1e-9
"""Share of the sums compared by which they may be off, generously: what is kept for it is only looked at in vain."""


@dataclass(frozen=True)
class Option:
    """What one format means for one unit."""

    bytes: int
    damage: float
    """Whatever adds up, such as nats a token."""


Options = Mapping[str, Mapping[str, Option]]
"""Unit to format to what it costs."""


@dataclass(frozen=True)
class Allocation:
    """A format for each unit."""

    formats: Mapping[str, str]
    bytes: int
    damage: float


def allocate(options: Options, budget: int) -> Allocation:
    """The formats of least summed damage that take at most `budget` bytes; of several such, those of fewest bytes.

    Exact up to the rounding of sums in float64. Raises ConfigError where nothing fits, and for an option that makes no sense.
    """
    table = _Table.of(options)
    if budget < (least := int(table.least_U.sum())):
        raise ConfigError(f"a budget of {budget} bytes is too small: with the smallest formats offered it takes {least}")
    price = _price(table, budget)
    bytes_F, damage_F, ways = np.zeros(1, np.int64), np.zeros(1), []
    room_U = budget - (table.least_U.sum() - np.cumsum(table.least_U))  # for the units so far, when the others take their least
    floor_U = np.cumsum((table.damage_UK + price.nats * table.bytes_UK).min(1))
    for unit in range(len(room_U)):
        bytes_KF, damage_KF = table.added(unit, bytes_F, damage_F)
        lost_KF = damage_KF + price.nats * bytes_KF - floor_U[unit]
        kept = np.flatnonzero((bytes_KF <= room_U[unit]) & (lost_KF <= price.slack))
        kept = kept[_undominated(bytes_KF.ravel()[kept], damage_KF.ravel()[kept])]
        ways.append(np.stack(np.divmod(kept, len(bytes_F))))
        bytes_F, damage_F = bytes_KF.ravel()[kept], damage_KF.ravel()[kept]
    return Allocation(_walked_back(options, ways), int(bytes_F[-1]), float(damage_F[-1]))


def frontier(options: Options) -> list[tuple[int, float]]:
    """(bytes, damage) of every choice that no other one beats in both, bytes rising and damage falling.

    The whole curve, hence exact for any budget; up to some hundred thousand points where many units have unlike sizes.
    """
    table = _Table.of(options)
    bytes_F, damage_F = np.zeros(1, np.int64), np.zeros(1)
    for unit in range(len(table.least_U)):
        bytes_KF, damage_KF = table.added(unit, bytes_F, damage_F)
        kept = _undominated(bytes_KF.ravel(), damage_KF.ravel())
        bytes_F, damage_F = bytes_KF.ravel()[kept], damage_KF.ravel()[kept]
    return list(zip(bytes_F.tolist(), damage_F.tolist(), strict=True))


@dataclass(frozen=True)
class _Table:
    """The options as arrays. Units with fewer options than others have some that do infinite damage."""

    bytes_UK: Ints
    damage_UK: Floats
    counts: list[int]

    @classmethod
    def of(cls, options: Options) -> _Table:
        _check(options)
        counts = [len(formats) for formats in options.values()]
        shape = len(counts), max(counts)
        bytes_UK, damage_UK = np.zeros(shape, np.int64), np.full(shape, np.inf)
        for unit, formats in enumerate(options.values()):
            bytes_UK[unit, : len(formats)] = [option.bytes for option in formats.values()]
            damage_UK[unit, : len(formats)] = [option.damage for option in formats.values()]
        return cls(bytes_UK, damage_UK, counts)

    @property
    def least_U(self) -> Ints:
        """Bytes of each unit's smallest option."""
        least_U: Ints = np.where(np.isfinite(self.damage_UK), self.bytes_UK, np.iinfo(np.int64).max).min(1)
        return least_U

    def added(self, unit: int, bytes_F: Ints, damage_F: Floats) -> tuple[Ints, Floats]:
        """Each choice on a frontier with each option of a unit, [K, F] both."""
        own = slice(self.counts[unit])
        return self.bytes_UK[unit, own, None] + bytes_F, self.damage_UK[unit, own, None] + damage_F


def _check(options: Options) -> None:
    if not options:
        raise ConfigError("there is no unit to choose a format for")
    for unit, formats in options.items():
        if not formats:
            raise ConfigError(f"{unit}: no format is offered for it")
        for name, option in formats.items():
            if option.bytes < 0 or not math.isfinite(option.damage):
                told = "bytes must be counted from 0 and damage must be a finite number"
                raise ConfigError(f"{unit}: {name} takes {option.bytes} bytes and does a damage of {option.damage}: {told}")


@dataclass(frozen=True)
class _Price:
    """What a byte is worth, and what a choice may lose against it; see the module's text."""

    nats: float
    slack: float


def _price(table: _Table, budget: int) -> _Price:
    """The lowest price found at which each unit's own best option leaves the whole within the budget."""

    def best_U(nats: float) -> tuple[Ints, Floats]:
        cost_UK = table.damage_UK + nats * table.bytes_UK
        # Of options that cost alike the smallest, or no price would do for units that are all the same.
        place_U1 = np.lexsort((table.bytes_UK, cost_UK))[:, :1]
        return np.take_along_axis(table.bytes_UK, place_U1, 1), np.take_along_axis(table.damage_UK, place_U1, 1)

    finite = table.damage_UK[np.isfinite(table.damage_UK)]
    low, high = 0.0, 2 * float(np.ptp(finite)) + 1  # a byte for more than all that damages can differ by
    if best_U(low)[0].sum() <= budget:
        high = low
    while low < (middle := (low + high) / 2) < high:  # until float64 has no number between
        low, high = (low, middle) if best_U(middle)[0].sum() <= budget else (middle, high)
    bytes_U1, damage_U1 = best_U(high)
    bound = float(damage_U1.sum()) + high * float(bytes_U1.sum() - budget)
    known = _filled(table, bytes_U1, damage_U1, budget - int(bytes_U1.sum()))
    return _Price(high, known - bound + _ROUNDING * (float(np.abs(damage_U1).sum()) + high * budget))


def _filled(table: _Table, bytes_U1: Ints, damage_U1: Floats, room: int) -> float:
    """The damage when the bytes left over are spent on whatever gains most and fits, again and again."""
    bytes_U1, damage_U1 = bytes_U1.copy(), damage_U1.copy()
    while True:
        gain_UK = np.where(table.bytes_UK - bytes_U1 <= room, damage_U1 - table.damage_UK, 0.0)
        unit, option = np.unravel_index(np.argmax(gain_UK), gain_UK.shape)
        if gain_UK[unit, option] <= 0:
            return float(damage_U1.sum())
        room -= int(table.bytes_UK[unit, option] - bytes_U1[unit, 0])
        bytes_U1[unit, 0], damage_U1[unit, 0] = table.bytes_UK[unit, option], table.damage_UK[unit, option]


def _undominated(bytes_C: Ints, damage_C: Floats) -> npt.NDArray[np.intp]:
    """Places of the choices that no other one beats, by rising bytes; of equal ones the first."""
    order = np.lexsort((damage_C, bytes_C))
    least = np.minimum.accumulate(damage_C[order])
    better = np.ones(len(order), bool)
    better[1:] = least[1:] < least[:-1]
    return order[better]


def _walked_back(options: Options, ways: list[npt.NDArray[np.intp]]) -> dict[str, str]:
    """The formats of the last choice on the last frontier; `ways`: of each unit's frontier the option and the choice before."""
    chosen, place = {}, -1
    for (unit, formats), (option_F, before_F) in zip(reversed(list(options.items())), reversed(ways), strict=True):
        chosen[unit] = list(formats)[option_F[place]]
        place = int(before_F[place])
    return {unit: chosen[unit] for unit in options}
