"""Scales and clips that spare the weights which matter: AWQ (Lin, Tang, Tang, Yang, Dang, Gan and Han, arXiv 2306.00978).

A weight that meets a large input does more harm when rounded. Multiplied by s > 1 its step is smaller beside it, and what it
reads is divided by s along a junction, so that the model computes what it did. The best s is searched for by what rounding then changes in
the outputs of a junction's readers on calibration inputs (section 3.2, equations 4 and 5).

Shape letters: C channels of a junction, I inputs, O outputs, G groups of inputs that share a scale, W inputs of a group, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.model.junction import Port
from lineshaft.ops.formats import Integer

LEAST_CLIP = 0.75
"""Of a group's range at least so much is kept. Groups hardly wanted less than 0.7, and finer steps matter more than farther ones."""
SEARCHED = 256
"""Scales are judged by so many tokens of a sample, or up to twice as many: those found so left 0.2 to 0.3 % more error than the best by
16,384 (docs/compression.md)."""
TILE = 1 << 18
"""Weights that are rounded at a time: 1 MiB of float32, near the fastest with 512 KiB of second-level cache a core."""


@dataclass(frozen=True, eq=False)  # tensors have no truth of being equal
class Reader:
    """A linear layer that reads a junction, and what came to it."""

    port: Port
    weight_OI: Tensor
    fmt: Integer
    sample_SI: Tensor
    tokens: int
    """As many tokens the sample stands for."""


def search(readers: Sequence[Reader], mean_C: Tensor, points: int = 20) -> tuple[Tensor, float]:
    """The best s of two families, float32 [C], and the error that it leaves as a share of that without scales.

    s = mean^a (the paper's) and s = mean^a / weight^(1 - a) (mean magnitudes of a channel's inputs and of the weights that read it, each
    beside the largest of its group, as later versions of the authors' code and llm-compressor have it), for `points` values of a from 0 up
    to 1; all divided by the root of their largest times their smallest, so that s lies around 1. No scale at all is among them.
    mean_C: of each channel, from inputs; a channel that was always zero keeps s = 1.
    """
    tried = [torch.ones_like(mean_C), *_candidates(readers, mean_C, points)]
    errors_N = torch.stack([_errors(item, tried) for item in readers]).sum(0)
    best, plain = int(errors_N.argmin()), float(errors_N[0])
    return tried[best], float(errors_N[best]) / plain if plain else 1.0


def _candidates(readers: Sequence[Reader], mean_C: Tensor, points: int) -> Iterator[Tensor]:
    weight_C = torch.stack([item.port.largest(_share(item), len(mean_C)) for item in readers]).amax(0)
    dead_C = (mean_C == 0) | (weight_C == 0)
    for step in range(1, points + 1):
        share = step / points
        yield _centred(mean_C**share, dead_C)
    for step in range(points):
        share = step / points
        yield _centred(mean_C**share / weight_C.clamp(min=1e-6) ** (1 - share), dead_C)


def _share(reader: Reader) -> Tensor:
    """Of each input the mean magnitude of its weights as a share of the largest in their group, [I]."""
    sum_I = torch.zeros(reader.weight_OI.shape[1])
    for weight_OI in _tiles(reader.weight_OI):
        grouped_OGW = _grouped(weight_OI.float().abs(), reader.fmt)
        sum_I += (grouped_OGW / grouped_OGW.amax(-1, keepdim=True).clamp(min=1e-12)).sum(0).flatten()
    return sum_I / len(reader.weight_OI)


def _centred(s_C: Tensor, dead_C: Tensor) -> Tensor:
    """Around 1; within 1e-4 and 1e4, so that norms keep their precision in sixteen bits."""
    if dead_C.all():
        return torch.ones_like(s_C)
    alive = s_C[~dead_C]
    return (s_C / (alive.max() * alive.min()).sqrt()).clamp(1e-4, 1e4).masked_fill(dead_C, 1.0)


def _errors(reader: Reader, tried: Sequence[Tensor]) -> Tensor:
    """By each s the sum of squares by which the reader's outputs change, over the tokens that the sample stands for; float64 [N].

    All s on one tile of the weight after another, so that what rounding reads and writes stays in a cache.
    """
    sample_SI = reader.sample_SI[:: max(len(reader.sample_SI) // SEARCHED, 1)]
    by_input, errors_N = [reader.port.spread(s_C) for s_C in tried], torch.zeros(len(tried), dtype=torch.float64)
    for weight_OI in _tiles(reader.weight_OI):
        wide_OI = weight_OI.float()
        for place, s_I in enumerate(by_input):
            error_OI = _error(_grouped(wide_OI * s_I, reader.fmt), reader.fmt).view_as(wide_OI).div_(s_I)
            errors_N[place] += (sample_SI @ error_OI.T).square_().sum()
    return errors_N * (reader.tokens / max(len(sample_SI), 1))


def _tiles(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight_OI, max(TILE // weight_OI.shape[1], 1))


def _error(grouped_OGW: Tensor, fmt: Integer) -> Tensor:
    """By how much the format would change a float32 weight; the same as encoding and decoding, without the packing. Spoils its input."""
    return _off_grid(grouped_OGW, fmt, *fmt.scale_and_zero(grouped_OGW))


def _off_grid(grouped_OGW: Tensor, fmt: Integer, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The same for these scales and zeros."""
    scale_OG1, zero_OG1 = scale_OG.float()[..., None], zero_OG.float()[..., None]
    steps_OGW = grouped_OGW.div_(scale_OG1)
    return steps_OGW.round().add_(zero_OG1).clamp_(0, 2**fmt.bits - 1).sub_(zero_OG1).sub_(steps_OGW).mul_(scale_OG1)


def _grouped(weight_OI: Tensor, fmt: Integer) -> Tensor:
    return weight_OI.reshape(len(weight_OI), fmt.groups(weight_OI.shape[1]), -1)


def clipped(weight_OI: Tensor, fmt: Integer, sample_SI: Tensor, points: int = 10) -> dict[str, Tensor]:
    """The tensors of `fmt` for a weight, each group clipped where its share of the outputs then changes least.

    Ranges from LEAST_CLIP of a group's own to all of it are tried, in `points` steps; by the error of the group alone on the
    sample, sum over tokens of (x . (rounded - w))^2, as if other groups were exact.
    """
    by_group = sample_SI.view(len(sample_SI), fmt.groups(weight_OI.shape[1]), -1).permute(1, 2, 0)
    gram_GWW = by_group @ by_group.transpose(1, 2)
    made = [_clipped(_grouped(tile_OI.float(), fmt), fmt, gram_GWW, points) for tile_OI in _tiles(weight_OI)]
    return fmt.store(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def _clipped(grouped_OGW: Tensor, fmt: Integer, gram_GWW: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of some rows."""
    best_OG = torch.full(grouped_OGW.shape[:2], torch.inf)
    best_scale_OG, best_zero_OG = fmt.scale_and_zero(grouped_OGW)
    for step in range(points + 1):
        scale_OG, zero_OG = fmt.scale_and_zero(grouped_OGW * (1 - step * (1 - LEAST_CLIP) / points))
        error_GOW = _off_grid(grouped_OGW.clone(), fmt, scale_OG, zero_OG).transpose(0, 1)
        error_OG = (error_GOW @ gram_GWW).mul_(error_GOW).sum(-1).T
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        best_scale_OG = torch.where(better_OG, scale_OG, best_scale_OG)
        best_zero_OG = torch.where(better_OG, zero_OG, best_zero_OG)
    return fmt.nearest(grouped_OGW, best_scale_OG[..., None], best_zero_OG[..., None]).flatten(1), best_scale_OG, best_zero_OG
