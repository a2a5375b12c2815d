"""What comes into linear layers while a model runs: the statistics that rounding and scaling by calibration work from.

Shape letters: T tokens, I inputs of a layer, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineshaft.compress.ranges import Histogram
from lineshaft.model.linear import Linear

SAMPLE = 1024
"""Tokens of a sample at most."""


@dataclass(frozen=True)
class Wanted:
    """What is gathered beside the magnitudes of channels, which cost nothing."""

    gram: bool = False
    sample: bool = False
    histogram: bool = False


class Inputs:
    """Statistics of one layer's inputs. How tokens are cut into calls changes sums in their last bits, maxima and sample not at all."""

    def __init__(self, inputs: int, wanted: Wanted) -> None:
        self.tokens = 0
        self.largest_I = torch.zeros(inputs)
        """Largest magnitude of each channel."""
        self._sum_I = torch.zeros(inputs, dtype=torch.float64)
        self.gram_II = torch.zeros(inputs, inputs) if wanted.gram else None
        """Sum of x x^T, float32."""
        self._sample: list[Tensor] | None = [] if wanted.sample else None
        self._stride = 1
        self.histogram = Histogram() if wanted.histogram else None
        """Of the magnitudes of all numbers."""

    @property
    def mean_I(self) -> Tensor:
        """Mean magnitude of each channel, float32; zeros when no token came."""
        return (self._sum_I / max(self.tokens, 1)).float()

    @property
    def sample_SI(self) -> Tensor:
        """Tokens at equal distances, SAMPLE / 2 to SAMPLE of them where so many came, else all; float32."""
        assert self._sample is not None
        return torch.cat(self._sample) if self._sample else torch.zeros(0, len(self.largest_I))

    def add(self, x_TI: Tensor) -> None:
        """Count these tokens."""
        x_TI = x_TI.detach()
        magnitude_TI = x_TI.abs().float()
        if len(x_TI):
            self.largest_I = torch.maximum(self.largest_I, magnitude_TI.amax(0))
        self._sum_I += magnitude_TI.sum(0)  # of one call in float32, which torch adds up in pieces; a float64 copy took as long as all else
        if self.gram_II is not None:
            wide_TI = x_TI.float()
            self.gram_II.addmm_(wide_TI.T, wide_TI)
        if self.histogram is not None:
            self.histogram.add(x_TI)
        if self._sample is not None:
            self._sample.append(x_TI[-self.tokens % self._stride :: self._stride].to(torch.float32, copy=True))
        self.tokens += len(x_TI)
        while self._sample is not None and sum(map(len, self._sample)) > SAMPLE:
            self._sample = [torch.cat(self._sample)[::2].clone()]  # a view would keep all of it in memory
            self._stride *= 2


@contextmanager
def watching(linears: Mapping[str, Linear], wanted: Wanted) -> Iterator[dict[str, Inputs]]:
    """Gather what comes into these layers while the block runs; by name, without those that were never called.

    Layers that are given the very same tensor one after another, as gate and up are, share one `Inputs`.
    """
    seen: dict[str, Inputs] = {}
    last: list[Any] = [None, None]

    def note(name: str, x_TI: Tensor) -> None:
        if last[0] is x_TI and seen.get(name, last[1]) is last[1]:
            seen[name] = last[1]
            return
        if name not in seen:
            seen[name] = Inputs(x_TI.shape[-1], wanted)
        seen[name].add(x_TI)
        last[:] = x_TI, seen[name]

    hooks = [linear.register_forward_pre_hook(_hook(note, name)) for name, linear in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _hook(note: Any, name: str) -> Any:
    def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        note(name, given[0])

    return before
