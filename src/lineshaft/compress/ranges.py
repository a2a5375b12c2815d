"""Where to clip numbers that are rounded to few bits: a histogram of what was observed, and five ways to choose from it.

Integers of `bits` bits are symmetric: codes from -L to L with L = 2^(bits - 1) - 1 levels, scale = clip / L, and whatever
is larger than the clip takes code L. Every way looks at magnitudes alone. Those that search try each upper edge of a bin from
that of bin L on, so that no step is finer than what the histogram can tell, and the largest number in the place of the last edge.

Shape letters: B bins, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 4096
_SMALLEST = -100
"""Bins are never narrower than 2^-100: in float32 a product with 2^100 is still exact, and nothing smaller matters."""


class Histogram:
    """Counts of |x| in bins of one width, a power of two, which doubles as larger numbers come in.

    The width depends on the largest number alone, and two bins become one without a remainder. So the counts are the same in
    whatever pieces and order the numbers came. More than half of the bins are in use.
    """

    def __init__(self, bins: int = BINS) -> None:
        """Raises ConfigError unless `bins` is a power of two."""
        if bins < 2 or bins & (bins - 1):
            raise ConfigError(f"a histogram of {bins} bins can't be widened: take a power of two")
        self.counts_B: Counts = np.zeros(bins, np.int64)
        self.largest = 0.0
        self._exponent = _SMALLEST

    @property
    def width(self) -> float:
        """Of a bin: bin b holds b * width <= |x| < (b + 1) * width."""
        return 2.0**self._exponent

    def add(self, x: Tensor) -> None:
        """Count the numbers of a tensor of any shape, in the precision of float32. Raises ConfigError for one that is not finite."""
        if not x.numel():
            return
        size = x.detach().to(torch.float32).abs()
        largest = float(size.max())
        if not math.isfinite(largest):
            raise ConfigError("an observed number is not a number or infinite: no range holds it")
        self._reach(largest)
        places = size.mul_(1 / self.width).to(torch.int64).flatten()
        self.counts_B += torch.bincount(places, minlength=len(self.counts_B)).cpu().numpy()

    def merge(self, other: Histogram) -> None:
        """Count what another histogram of as many bins has counted. Raises ConfigError for one of more or fewer."""
        if len(self.counts_B) != len(other.counts_B):
            raise ConfigError(f"histograms of {len(self.counts_B)} and {len(other.counts_B)} bins can't be merged")
        self._reach(other.largest)
        self.counts_B += _coarser(other.counts_B, self._exponent - other._exponent)

    def _reach(self, largest: float) -> None:
        """Widen the bins until the last one ends above this number."""
        self.largest = max(self.largest, largest)
        needed = math.frexp(self.largest)[1] - (len(self.counts_B).bit_length() - 1)
        if self.largest and needed > self._exponent:
            self.counts_B = _coarser(self.counts_B, needed - self._exponent)
            self._exponent = needed

    @property
    def edges_B(self) -> Floats:
        """The upper edge of each bin in use, the largest number in the place of the last: what a clip may be."""
        edges_B = np.arange(1, int(self.largest / self.width) + 2, dtype=np.float64) * self.width
        edges_B[-1] = self.largest
        return edges_B

    @property
    def used_B(self) -> Counts:
        """Counts of the bins in use. Raises ConfigError while nothing was counted."""
        if not self.counts_B.any():
            raise ConfigError("no numbers were observed: a range needs some")
        return self.counts_B[: len(self.edges_B)]

    @property
    def middles_B(self) -> Floats:
        """What stands for the numbers of each bin in use."""
        return (np.arange(len(self.edges_B), dtype=np.float64) + 0.5) * self.width


def _coarser(counts_B: Counts, doublings: int) -> Counts:
    """Counts of as many bins, each as wide as 2^doublings were."""
    bins = len(counts_B)
    joined = counts_B.reshape(-1, min(bins, 2**doublings)).sum(1)
    return np.pad(joined, (0, bins - len(joined)))


def minmax(histogram: Histogram, bits: int) -> float:
    """The largest magnitude: nothing is clipped."""
    assert histogram.used_B.any()
    return histogram.largest


def percentile(histogram: Histogram, bits: int, share: float = 0.9999) -> float:
    """The first edge below which at least this share of the numbers lies."""
    below_B = np.cumsum(histogram.used_B)
    return float(histogram.edges_B[np.searchsorted(below_B, share * below_B[-1])])


def cut(histogram: Histogram, bits: int, share: float = 0.001) -> float:
    """The first edge at which clipping takes away at most this share of the summed magnitude: sum (|x| - clip)+ <= share * sum |x|.

    A percentile counts numbers; this one weighs them by how much of them is lost. Sums are those of the middles of bins.
    """
    counts_B, middles_B, edges_B = histogram.used_B, histogram.middles_B, histogram.edges_B
    above_B = counts_B.sum() - np.cumsum(counts_B)
    mass_B = counts_B @ middles_B - np.cumsum(counts_B * middles_B)
    lost_B = mass_B - above_B * edges_B
    return float(edges_B[np.argmax(lost_B <= share * (counts_B @ middles_B))])


def mse(histogram: Histogram, bits: int) -> float:
    """The edge with the least squared error of rounding and clipping, summed over bins of n numbers with the middle m:

    sum n (m - q(m))^2, q(m) = min(round(m / s), L) s, s = clip / L, ties to even. Of equals the smallest.
    """
    return min(_trials(histogram, bits), key=_squared_error).clip


def entropy(histogram: Histogram, bits: int) -> float:
    """The edge with the least divergence between what was observed and what rounding leaves of it (Migacz, GTC 2017, S7310).

    For the clip at the edge of bin k: P is n over bins 0 to k, with all numbers of later bins added to bin k. Q knows nothing of those:
    n over bins 0 to k is summed over the bins whose middles take one code, min(round(m / s), L), and each sum is spread evenly over
    those of its bins where P is not zero. Both are divided by their sums; the divergence is sum P ln(P / Q), infinite where Q is zero
    and P is not. Of equals the smallest. Migacz cuts the bins into 128 equal parts; here they are those of the codes.
    """
    return min(_trials(histogram, bits), key=_divergence).clip


@dataclass(frozen=True)
class _Trial:
    """What one clip makes of a histogram."""

    counts_B: Counts
    middles_B: Floats
    clip: float
    place: int
    """The bin at whose edge the clip is."""
    step: float
    codes_B: Counts


def _trials(histogram: Histogram, bits: int) -> Iterator[_Trial]:
    counts_B, edges_B, middles_B, levels = histogram.used_B, histogram.edges_B, histogram.middles_B, 2 ** (bits - 1) - 1
    for place in range(min(levels, len(edges_B) - 1), len(edges_B)):
        clip = float(edges_B[place])
        step = clip / levels or 1.0  # all numbers are zero: any step will do
        yield _Trial(counts_B, middles_B, clip, place, step, np.minimum(np.rint(middles_B / step), levels).astype(np.int64))


def _squared_error(trial: _Trial) -> float:
    return float(trial.counts_B @ (trial.middles_B - trial.codes_B * trial.step) ** 2)


def _divergence(trial: _Trial) -> float:
    kept_B, codes_B = trial.counts_B[: trial.place + 1], trial.codes_B[: trial.place + 1]
    observed_B = kept_B.astype(np.float64)
    observed_B[-1] += trial.counts_B[trial.place + 1 :].sum()
    held_B = observed_B > 0
    total_C, share_C = np.bincount(codes_B, kept_B), np.bincount(codes_B, held_B)
    left_B = total_C[codes_B[held_B]] / share_C[codes_B[held_B]]
    if not left_B.all():
        return math.inf
    p_B, q_B = observed_B[held_B] / observed_B.sum(), left_B / kept_B.sum()
    return float(p_B @ np.log(p_B / q_B))


METHODS: Mapping[str, Callable[[Histogram, int], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "cut": cut,
}
"""From what was observed and the bits of a code to the clip, which is 0 only where all numbers were."""
