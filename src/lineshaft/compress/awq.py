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

LEAST_CLIP = 0.5
"""Of a group's range at least so much is kept."""


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
    plain = best = _error(readers, torch.ones_like(mean_C))
    best_C = torch.ones_like(mean_C)
    for s_C in _candidates(readers, mean_C, points):
        found = _error(readers, s_C)
        if found < best:
            best, best_C = found, s_C
    return best_C, best / plain if plain else 1.0


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
    grouped_OGW = _grouped(reader.weight_OI.float().abs(), reader.fmt)
    return (grouped_OGW / grouped_OGW.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).flatten()


def _centred(s_C: Tensor, dead_C: Tensor) -> Tensor:
    """Around 1; within 1e-4 and 1e4, so that norms keep their precision in sixteen bits."""
    if dead_C.all():
        return torch.ones_like(s_C)
    alive = s_C[~dead_C]
    return (s_C / (alive.max() * alive.min()).sqrt()).clamp(1e-4, 1e4).masked_fill(dead_C, 1.0)


def _error(readers: Sequence[Reader], s_C: Tensor) -> float:
    """Sum of squares by which the readers' outputs change, over the tokens that the samples stand for."""
    total = 0.0
    for item in readers:
        s_I, weight_OI = item.port.spread(s_C), item.weight_OI.float()
        error_OI = _rounded(weight_OI * s_I, item.fmt).div_(s_I).sub_(weight_OI)
        share = item.tokens / max(len(item.sample_SI), 1)
        total += share * float((item.sample_SI @ error_OI.T).square().sum())
    return total


def _rounded(weight_OI: Tensor, fmt: Integer) -> Tensor:
    """What the format would make of a weight, float32; the same as encoding and decoding, without the packing."""
    grouped_OGW = _grouped(weight_OI, fmt)
    scale_OG, zero_OG = fmt.scale_and_zero(grouped_OGW)
    return _on_grid(grouped_OGW, fmt, scale_OG, zero_OG).view(weight_OI.shape)


def _on_grid(grouped_OGW: Tensor, fmt: Integer, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    scale_OG1, zero_OG1 = scale_OG.float()[..., None], zero_OG.float()[..., None]
    return (grouped_OGW / scale_OG1).round_().add_(zero_OG1).clamp_(0, 2**fmt.bits - 1).sub_(zero_OG1).mul_(scale_OG1)


def _grouped(weight_OI: Tensor, fmt: Integer) -> Tensor:
    return weight_OI.reshape(len(weight_OI), fmt.groups(weight_OI.shape[1]), -1)


def clipped(weight_OI: Tensor, fmt: Integer, sample_SI: Tensor, points: int = 10) -> dict[str, Tensor]:
    """The tensors of `fmt` for a float32 weight, each group clipped where its share of the outputs then changes least.

    Ranges from LEAST_CLIP of a group's own to all of it are tried, in `points` steps; by the error of the group alone on the
    sample, sum over tokens of (x . (rounded - w))^2, as if other groups were exact.
    """
    grouped_OGW = _grouped(weight_OI, fmt)
    by_group = sample_SI.view(len(sample_SI), grouped_OGW.shape[1], -1).permute(1, 2, 0)
    gram_GWW = by_group @ by_group.transpose(1, 2)
    best_OG: Tensor | None = None
    for step in range(points + 1):
        keep = 1 - step * (1 - LEAST_CLIP) / points
        scale_OG, zero_OG = fmt.scale_and_zero(grouped_OGW * keep)
        error_GOW = (_on_grid(grouped_OGW, fmt, scale_OG, zero_OG) - grouped_OGW).transpose(0, 1)
        error_OG = ((error_GOW @ gram_GWW) * error_GOW).sum(-1).T
        if best_OG is None:
            best_OG, best_scale_OG, best_zero_OG = error_OG, scale_OG, zero_OG
            continue
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        best_scale_OG = torch.where(better_OG, scale_OG, best_scale_OG)
        best_zero_OG = torch.where(better_OG, zero_OG, best_zero_OG)
    codes_OGW = fmt.nearest(grouped_OGW, best_scale_OG[..., None], best_zero_OG[..., None])
    return fmt.store(codes_OGW.flatten(1), best_scale_OG, best_zero_OG)
