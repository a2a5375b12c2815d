"""Is one model worse than another, or was it chance? Paired comparisons over the same rows, documents or requests.

A row has an amount for each of the two (summed nats, seconds, joules) and one weight for both (tokens). What the rows have in
common, hard texts above all, cancels in the differences. Less is better everywhere: hand in costs.

Shape letters: R rows, S resamples, K counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lineshaft.base.errors import ConfigError

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "no difference seen"]
_AT_ONCE = 1 << 20
"""Numbers of a batch of resamples: 8 MiB."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and where the true value is taken to lie."""

    estimate: float
    low: float
    high: float
    error: float
    """The share of such intervals that miss the true value, half of them on each side."""

    def verdict(self, margin: float = 0.0) -> Verdict:
        """For a change in a cost, in the interval's own unit: is it beyond the margin, whole interval and all?

        Where the true change is no larger than the margin, "worse" is said in at most error / 2 of the cases, and so is "better". "No
        difference seen" is no proof of none: what was not ruled out is up to `high`.
        """
        if self.low > margin:
            return "worse"
        return "better" if self.high < -margin else "no difference seen"


@dataclass(frozen=True)
class Comparison:
    """What a new model costs more than the one it is compared with, on the same rows."""

    difference: Interval
    """Of the weighted means, in units of amount a weight (nats a token): sum (new - old) / sum weight; by linearisation."""
    rise: Interval
    """The same as a share of the old model's: sum (new - old) / sum old; by linearisation."""
    resampled: Interval
    """`difference` by a bootstrap of whole rows: percentiles. Where it disagrees with the other there are too few rows for either."""


def compare(
    old_R: npt.ArrayLike, new_R: npt.ArrayLike, weight_R: npt.ArrayLike, error: float = 0.05, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare the amounts of two models, row by row; rows must be independent of each other: whole documents, not tokens.

    Raises ConfigError for fewer than two rows, rows that do not match, numbers that are not finite, weights that are not positive, and
    an old model without any amount.
    """
    old_R, new_R, weight_R = _checked(old_R, new_R, weight_R)
    if not 0 < error < 1:
        raise ConfigError(f"error: {error} is not a share between 0 and 1")
    more_R = new_R - old_R
    return Comparison(_ratio(more_R, weight_R, error), _ratio(more_R, old_R, error), _bootstrap(more_R, weight_R, error, resamples, seed))


def share_of(part_R: npt.ArrayLike, whole_R: npt.ArrayLike, error: float = 0.05) -> Interval:
    """sum part / sum whole over independent rows, such as tokens on which two models agree, by documents. Raises ConfigError for fewer
    than two rows, rows that do not match, and a whole that is not positive."""
    parts, wholes = np.asarray(part_R, np.float64), np.asarray(whole_R, np.float64)
    if parts.shape != wholes.shape or parts.ndim != 1 or len(parts) < 2 or not (wholes > 0).all():
        raise ConfigError(f"a share takes two rows or more, with a positive whole each: {list(parts.shape)} and {list(wholes.shape)}")
    return _ratio(parts, wholes, error)


def resampled(rows: int, resamples: int = 2000, seed: int = 0) -> Floats:
    """How often each resample of a bootstrap takes each row, [S, R]: for what can be worked out from sums over rows."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)


def percentiles(estimate: float, value_S: Floats, rows: int, error: float = 0.05) -> Interval:
    """The interval of an estimate from its values in resamples of so many rows, two or more.

    Percentiles, moved outward as far as Student's t with rows - 1 degrees of freedom lies outside the normal distribution: those of
    the bootstrap alone are too narrow for few rows (Hesterberg 2015, "What teachers should know about the bootstrap", section 3.3).
    """
    far = student_quantile(1 - error / 2, rows - 1) * math.sqrt(rows / (rows - 1))
    tail = math.erfc(far / math.sqrt(2)) / 2
    low, high = np.quantile(value_S, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), error)


def _checked(*rows: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    old_R, new_R, weight_R = (np.asarray(item, np.float64) for item in rows)
    if not old_R.shape == new_R.shape == weight_R.shape or old_R.ndim != 1 or len(old_R) < 2:
        told = " and ".join(str(list(item.shape)) for item in (old_R, new_R, weight_R))
        raise ConfigError(f"a paired comparison takes the same two rows or more of each: old, new and weight are {told}")
    if not all(np.isfinite(item).all() for item in (old_R, new_R, weight_R)):
        raise ConfigError("a row holds what is not a number or infinite: leave it out of both models, or see what went wrong there")
    if (weight_R <= 0).any():
        raise ConfigError(f"row {int(np.argmax(weight_R <= 0))} has no weight: leave out rows without tokens")
    if old_R.sum() <= 0:
        raise ConfigError("the old model costs nothing on these rows: there is nothing to compare with")
    return old_R, new_R, weight_R


def _ratio(part_R: Floats, whole_R: Floats, error: float) -> Interval:
    """sum part / sum whole, by the linearised variance of a ratio with R - 1 degrees of freedom (Cochran 1977, section 2.11).

    Var = R / (R - 1) * sum (part - ratio * whole)^2 / (sum whole)^2.
    """
    rows, total, ratio = len(part_R), whole_R.sum(), part_R.sum() / whole_R.sum()
    spread = math.sqrt(rows / (rows - 1) * ((part_R - ratio * whole_R) ** 2).sum()) / total
    half = student_quantile(1 - error / 2, rows - 1) * spread
    return Interval(float(ratio), float(ratio - half), float(ratio + half), error)


def _bootstrap(part_R: Floats, whole_R: Floats, error: float, resamples: int, seed: int) -> Interval:
    """sum part / sum whole, by percentiles over resampled rows (Efron and Tibshirani 1993, section 13.3)."""
    if resamples * error < 2:
        raise ConfigError(
            f"{resamples} resamples do not tell the ends of an interval with an error of {error}: take {math.ceil(2 / error)}"
        )
    generator, rows = np.random.default_rng(seed), len(part_R)
    ratio_S = np.empty(resamples)
    batch = max(1, _AT_ONCE // rows)
    for first in range(0, resamples, batch):
        chosen_SR = generator.integers(rows, size=(min(batch, resamples - first), rows))
        ratio_S[first : first + batch] = part_R[chosen_SR].sum(1) / whole_R[chosen_SR].sum(1)
    low, high = np.quantile(ratio_S, [error / 2, 1 - error / 2])
    return Interval(float(part_R.sum() / whole_R.sum()), float(low), float(high), error)


def mcnemar(old_correct_R: npt.ArrayLike, new_correct_R: npt.ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test that both are correct equally often (McNemar 1947, with binomial tails).

    Only rows on which one of them is correct tell anything: with n of these, k of them the rarer kind, it is twice the chance of k or
    fewer heads in n throws, at most 1. Raises ConfigError for rows that do not match.
    """
    old_R, new_R = np.asarray(old_correct_R, bool), np.asarray(new_correct_R, bool)
    if old_R.shape != new_R.shape or old_R.ndim != 1:
        raise ConfigError(f"a paired comparison takes the same rows of each: old and new are {list(old_R.shape)} and {list(new_R.shape)}")
    lost, won = int((old_R & ~new_R).sum()), int((new_R & ~old_R).sum())
    return min(1.0, 2 * _heads(min(lost, won), lost + won))


def _heads(most: int, throws: int) -> float:
    """The chance of so many heads or fewer. In logarithms: the single chances underflow from a thousand throws on."""
    step_K = np.arange(most, dtype=np.float64)
    log_K = np.concatenate([[0.0], np.cumsum(np.log((throws - step_K) / (step_K + 1)))]) - throws * math.log(2)
    return float(np.exp(log_K - log_K[-1]).sum() * math.exp(log_K[-1]))


@lru_cache
def student_quantile(chance: float, freedom: int) -> float:
    """The number below which Student's t with whole degrees of freedom lies with this chance, to 1e-10 of it.

    Bisection of the distribution's closed form (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), in the angle atan(t / sqrt(freedom)).
    Raises ConfigError for a chance outside (0, 1) or less than one degree of freedom.
    """
    if not 0 < chance < 1 or freedom < 1:
        raise ConfigError(f"Student's t has no quantile {chance} with {freedom} degrees of freedom")
    if chance < 0.5:
        return -student_quantile(1 - chance, freedom)
    terms_K = _terms(freedom)
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        low, high = (angle, high) if _within(angle, freedom, terms_K) < 2 * chance - 1 else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


def _terms(freedom: int) -> Floats:
    """The coefficients of cos^p, cos^(p + 2), ... in the closed form, p being 1 for odd degrees of freedom and 0 for even ones."""
    odd = freedom % 2
    step_K = 2.0 * np.arange(1, (freedom - odd) // 2) + odd
    first = [1.0] if freedom > 1 else []
    return np.concatenate([first, np.cumprod((step_K - 1) / step_K)])


def _within(angle: float, freedom: int, terms_K: Floats) -> float:
    """The chance of |t| below sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    total = math.sin(angle) * float(terms_K @ math.cos(angle) ** (2.0 * np.arange(len(terms_K)) + odd))
    return (angle + total) * 2 / math.pi if odd else total
