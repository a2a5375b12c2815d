"""Clips against a search over every edge written out in numpy, what they do to heavy tails, and histograms that grow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.compress.ranges import METHODS, Histogram, cut, entropy, minmax, mse, percentile

COUNT = 100_000


def laplace_with_outliers(generator: np.random.Generator) -> np.ndarray:
    """One in ten thousand is thirty times as large."""
    x = generator.laplace(size=COUNT)
    x[: COUNT // 10_000] *= 30
    return x


TAILS = {
    "student 5": lambda generator: generator.standard_t(5, COUNT),
    "student 8": lambda generator: generator.standard_t(8, COUNT),
    "laplace": lambda generator: generator.laplace(size=COUNT),
    "laplace with outliers": laplace_with_outliers,
}


def tail(name: str) -> np.ndarray:
    return TAILS[name](np.random.default_rng(7)).astype(np.float32).astype(np.float64)


def observed(x: np.ndarray | Tensor, bins: int = 4096) -> Histogram:
    histogram = Histogram(bins)
    histogram.add(torch.as_tensor(x))
    return histogram


def rounding_error(x: np.ndarray, clip: float, bits: int) -> float:
    """Mean squared, of the numbers themselves."""
    levels = 2 ** (bits - 1) - 1
    return float(((x - np.clip(np.rint(x / (clip / levels)), -levels, levels) * clip / levels) ** 2).mean())


# -- against a search of our own --------------------------------------------------------------------------------------


def bins_of(x: np.ndarray, bins: int) -> tuple[list[float], list[float], list[int]]:
    """(lower edges, middles, counts) of the bins up to the largest number, counted one by one."""
    size = np.abs(x).astype(np.float64)
    width = 2.0 ** (math.floor(math.log2(size.max())) + 1) / bins
    used = math.floor(size.max() / width) + 1
    lower = [b * width for b in range(used)]
    return lower, [edge + width / 2 for edge in lower], [int(((size >= edge) & (size < edge + width)).sum()) for edge in lower]


def clips_of(x: np.ndarray, bins: int, levels: int) -> list[float]:
    lower, _, _ = bins_of(x, bins)
    edges = [*lower[1:], float(np.abs(x).max())]
    return edges[levels:] or edges[-1:]


def squared_error(x: np.ndarray, bins: int, levels: int, clip: float) -> float:
    _, middles, counts = bins_of(x, bins)
    step, total = clip / levels, 0.0
    for middle, count in zip(middles, counts, strict=True):
        total += count * (middle - min(round(middle / step), levels) * step) ** 2
    return total


def divergence(x: np.ndarray, bins: int, levels: int, clip: float) -> float:
    """sum P ln(P / Q), bin by bin, as `entropy` says it."""
    lower, middles, counts = bins_of(x, bins)
    inside = [b for b, edge in enumerate(lower) if edge < clip] if clip < np.abs(x).max() else list(range(len(lower)))
    observed_of = {b: counts[b] for b in inside}
    observed_of[inside[-1]] += sum(counts[b] for b in range(len(lower)) if b > inside[-1])
    code_of = {b: min(round(middles[b] / (clip / levels)), levels) for b in inside}
    total = 0.0
    for b in inside:
        if observed_of[b]:
            company = [other for other in inside if code_of[other] == code_of[b]]
            left = sum(counts[other] for other in company) / sum(observed_of[other] > 0 for other in company)
            if not left:
                return math.inf
            p, q = observed_of[b] / sum(observed_of.values()), left / sum(counts[other] for other in inside)
            total += p * math.log(p / q)
    return total


@pytest.mark.parametrize(("method", "loss"), [(mse, squared_error), (entropy, divergence)])
@pytest.mark.parametrize("bits", [3, 4, 5])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(["student", "laplace", "few", "one far"]))
def test_no_edge_of_the_histogram_does_better(method, loss, bits: int, seed: int, shape: str) -> None:
    generator, bins, levels = np.random.default_rng(seed), 64, 2 ** (bits - 1) - 1
    x = {
        "student": lambda: generator.standard_t(4, 500),
        "laplace": lambda: generator.laplace(size=500),
        "few": lambda: generator.normal(size=5),
        "one far": lambda: np.append(generator.normal(size=300), 40.0),
    }[shape]().astype(np.float32)
    losses = {clip: loss(x, bins, levels, clip) for clip in clips_of(x, bins, levels)}
    found = method(observed(x, bins), bits)
    assert found in losses
    assert losses[found] == pytest.approx(min(losses.values()), rel=1e-9, abs=1e-12)


def test_the_share_beyond_a_percentile_is_as_asked_to_a_bin() -> None:
    x = tail("student 5")
    for share in (0.5, 0.99, 0.9999, 1.0):
        histogram = observed(x)
        clip = percentile(histogram, 8, share)
        assert (np.abs(x) <= clip).mean() >= share
        assert (np.abs(x) < clip - histogram.width).mean() < share


def test_what_a_cut_takes_away_is_as_asked_to_a_bin() -> None:
    x = np.abs(tail("laplace with outliers"))
    for share in (0.1, 0.001, 0.0001):
        histogram = observed(x)
        clip, slack = cut(histogram, 8, share), len(x) * histogram.width
        assert np.maximum(x - clip, 0).sum() <= share * x.sum() + slack
        assert np.maximum(x - clip + 2 * histogram.width, 0).sum() > share * (x.sum() - slack)
    assert cut(observed(x), 8, 0.0) == x.max()


# -- what they are for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAILS)
def test_least_squares_beat_the_largest_number_on_heavy_tails(name: str) -> None:
    x, histogram = tail(name), observed(tail(name))
    for bits, gain in ((8, 1.2), (4, 3)):
        assert rounding_error(x, mse(histogram, bits), bits) * gain < rounding_error(x, minmax(histogram, bits), bits)


@pytest.mark.parametrize(("name", "bits"), [(name, 4) for name in TAILS] + [(name, 8) for name in list(TAILS)[:3]])
def test_divergence_beats_the_largest_number_on_heavy_tails(name: str, bits: int) -> None:
    x, histogram = tail(name), observed(tail(name))
    assert rounding_error(x, entropy(histogram, bits), bits) * 1.2 < rounding_error(x, minmax(histogram, bits), bits)


def test_divergence_gives_up_rare_outliers_even_where_eight_bits_could_hold_them() -> None:
    """What `entropy` is not good for, and `mse` is."""
    x, histogram = tail("laplace with outliers"), observed(tail("laplace with outliers"))
    assert rounding_error(x, entropy(histogram, 8), 8) > rounding_error(x, minmax(histogram, 8), 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_least_squares_are_those_of_the_numbers_themselves(bits: int) -> None:
    """The bins are fine enough: no clip on a dense grid leaves the numbers a clearly smaller error."""
    x = tail("student 5")
    best = min(rounding_error(x, clip, bits) for clip in np.linspace(0.02, 1, 400) * np.abs(x).max())
    assert rounding_error(x, mse(observed(x), bits), bits) <= best * 1.01


# -- the histogram ----------------------------------------------------------------------------------------------------

numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=12)


@given(st.lists(numbers, min_size=1, max_size=5), st.randoms())
def test_pieces_in_any_order_and_merged_halves_count_the_same_as_all_at_once(pieces: list[list[float]], chance) -> None:
    whole = observed(torch.tensor([x for piece in pieces for x in piece]), 16)
    chance.shuffle(pieces)
    streamed, early, late = Histogram(16), Histogram(16), Histogram(16)
    for place, piece in enumerate(pieces):
        streamed.add(torch.tensor(piece))
        (early if place % 2 else late).add(torch.tensor(piece))
    early.merge(late)
    for other in (streamed, early):
        assert (other.width, other.largest, other.counts_B.tolist()) == (whole.width, whole.largest, whole.counts_B.tolist())


@given(numbers.filter(bool))
def test_each_number_is_in_the_bin_that_holds_it(x: list[float]) -> None:
    histogram = observed(torch.tensor(x), 8)
    places = [int(abs(value) // histogram.width) for value in x]  # exact: widths are powers of two
    assert histogram.counts_B.tolist() == np.bincount(places, minlength=8).tolist()
    assert histogram.width == 2.0**-100 or histogram.largest >= 4 * histogram.width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_counted_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert observed(x).counts_B.tolist() == observed(x.float().flatten()).counts_B.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_method_holds_at_the_ends(method: str, bits: int) -> None:
    choose = METHODS[method]
    assert choose(observed(torch.zeros(5)), bits) == 0
    histogram = observed(torch.full((5,), -3.0))
    assert 3 * 0.998 <= choose(histogram, bits) <= 3
    assert 0 < choose(observed(torch.tensor([0.0, 1e-30, 2.0])), bits) <= 2
    with pytest.raises(ConfigError, match="no numbers were observed"):
        choose(Histogram(), bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_range_are_refused_and_leave_the_histogram_alone(value: float) -> None:
    histogram = observed(torch.ones(3))
    with pytest.raises(ConfigError, match="not a number or infinite"):
        histogram.add(torch.tensor([1.0, value]))
    assert (histogram.counts_B.sum(), histogram.largest) == (3, 1)


def test_histograms_that_can_not_be_widened_or_merged_are_refused() -> None:
    for bins in (0, 1, 100):
        with pytest.raises(ConfigError, match="take a power of two"):
            Histogram(bins)
    with pytest.raises(ConfigError, match="16 and 32 bins can't be merged"):
        Histogram(16).merge(Histogram(32))
