"""What the calibrated steps do to each part of a model: GPTQ, AWQ, static INT8, SmoothQuant as methods of a walk (calibrate/walk.py)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.compress import awq
from lineshaft.compress.calibrate.observe import Inputs, Wanted
from lineshaft.compress.calibrate.parts import Part
from lineshaft.compress.config import AwqConfig, GptqConfig, Rounding, SmoothConfig, StaticConfig
from lineshaft.compress.gptq import Factor, gptq
from lineshaft.compress.ranges import METHODS
from lineshaft.compress.smooth import smooth
from lineshaft.model.junction import Junction, Port, scale
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import DENSE, Format, Integer


def _chosen(part: Part, config: Rounding) -> dict[str, Linear]:
    return {name: linear for name, linear in part.linears().items() if config.coding_of(name) != DENSE}


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What does not fit is told with the layer's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"compress: {name}: {error}; or add it to skip") from None


@dataclass(frozen=True)
class Gptq:
    """Rounds each layer by what comes into it once the parts before it are rounded."""

    config: GptqConfig
    name: ClassVar[str] = "gptq"
    wanted: ClassVar[Wanted] = Wanted(gram=True)
    changes_outputs: ClassVar[bool] = True

    def format_of(self, layer: str) -> Format:
        """See Method."""
        return self.config.coding_of(layer)

    def watched(self, part: Part) -> dict[str, Linear]:
        """See Method."""
        return _chosen(part, self.config)

    def treat(self, part: Part, seen: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """See Method. A layer that no token came to is rounded to nearest."""
        factors: dict[int, Factor] = {}  # gate and up share one, and so do query, key and value
        turns: dict[int, int] = {}  # so what they share is factored once, even where another layer stands between them
        chosen = _chosen(part, self.config).items()
        for name, linear in sorted(chosen, key=lambda item: turns.setdefault(id(seen.get(item[0])), len(turns))):
            fmt = self.format_of(name)
            assert isinstance(fmt, Integer)
            with _told(name):
                linear.hold(fmt, self._codes(linear, fmt, seen.get(name), factors))
        return {}

    def _codes(self, linear: Linear, fmt: Integer, inputs: Inputs | None, factors: dict[int, Factor]) -> dict[str, Tensor]:
        weight_OI = linear.dense_weight(torch.float32)
        if inputs is None:
            return fmt.encode(weight_OI)
        assert inputs.gram_II is not None
        if id(inputs) not in factors:
            factors.clear()  # of those before none is needed again, and each is as large as its Hessian
            factors[id(inputs)] = Factor.of(inputs.gram_II, self.config.damp, self.config.order)
        return gptq(weight_OI, factors[id(inputs)], fmt)


@dataclass(frozen=True)
class Awq:
    """Scales junctions, then clips and rounds."""

    config: AwqConfig
    name: ClassVar[str] = "awq"
    wanted: ClassVar[Wanted] = Wanted(sample=True)
    changes_outputs: ClassVar[bool] = False

    def format_of(self, layer: str) -> Format:
        """See Method."""
        return self.config.coding_of(layer)

    def watched(self, part: Part) -> dict[str, Linear]:
        """See Method."""
        return _chosen(part, self.config)

    def treat(self, part: Part, seen: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """See Method. A layer that no token came to has no say in scales."""
        linears, scales = _chosen(part, self.config), {}
        read_by: dict[str, Tensor] = {}
        for junction in part.junctions():
            called = [port for port in junction.readers if port.module in linears and port.module in seen]
            if not called:
                continue
            readers = [self._reader(port, linears, seen) for port in called]
            s_C, _ = awq.search(readers, mean_of(junction, seen), self.config.points)
            scale(part.model, junction, s_C)
            scales[junction.name] = s_C
            read_by |= {port.module: port.spread(s_C) for port in junction.readers}
        for name, linear in linears.items():
            fmt = self.format_of(name)
            assert isinstance(fmt, Integer)
            with _told(name):
                linear.hold(fmt, self._codes(linear, fmt, seen.get(name), read_by.get(name)))
        return scales

    def _reader(self, port: Port, linears: Mapping[str, Linear], seen: Mapping[str, Inputs]) -> awq.Reader:
        fmt, linear, inputs = self.format_of(port.module), linears[port.module], seen[port.module]
        assert isinstance(fmt, Integer)
        with _told(port.module):
            fmt.groups(linear.in_features)
        return awq.Reader(port, linear.weight.detach(), fmt, inputs.sample_SI, inputs.tokens)

    def _codes(self, linear: Linear, fmt: Integer, inputs: Inputs | None, s_I: Tensor | None) -> dict[str, Tensor]:
        weight_OI = linear.weight.detach()
        # Eight bits have steps to spare; and fewer tokens than a group has inputs say nothing of some of its weights.
        if inputs is None or not self.config.clip or fmt.bits == 8 or len(inputs.sample_SI) < (fmt.group or linear.in_features):
            return fmt.encode(weight_OI)
        return awq.clipped(weight_OI, fmt, inputs.sample_SI if s_I is None else inputs.sample_SI / s_I)


@dataclass(frozen=True)
class Static:
    """Rounds to nearest, and finds the range of what comes into each layer while nothing is rounded yet."""

    config: StaticConfig
    experts: Container[str]
    """Names of routed experts' layers: few tokens come to one, so each token keeps its own scale there."""
    name: ClassVar[str] = "static"
    wanted: ClassVar[Wanted] = Wanted(histogram=True)
    changes_outputs: ClassVar[bool] = False

    def format_of(self, layer: str) -> Format:
        """See Method."""
        fmt = self.config.coding_of(layer)
        if isinstance(fmt, Integer) and fmt.activations == "int8-static" and layer in self.experts:
            return replace(fmt, activations="int8")
        return fmt

    def watched(self, part: Part) -> dict[str, Linear]:
        """See Method."""
        return _chosen(part, self.config)

    def treat(self, part: Part, seen: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """See Method. Raises ConfigError for a layer that needs a range and that no token came to."""
        clips: dict[int, float] = {}  # gate and up share one, and so do query, key and value: entropy takes seconds to find it
        for name, linear in _chosen(part, self.config).items():
            fmt = self.format_of(name)
            assert isinstance(fmt, Integer)
            with _told(name):
                linear.hold(fmt, self._tensors(linear, fmt, seen.get(name), clips))
        return {}

    def _tensors(self, linear: Linear, fmt: Integer, inputs: Inputs | None, clips: dict[int, float]) -> dict[str, Tensor]:
        weight_OI = linear.dense_weight(torch.float32)
        if fmt.activations != "int8-static":
            return fmt.encode(weight_OI)
        if inputs is None or inputs.histogram is None:
            raise ConfigError("no calibration token came to it, so its activations have no range: give it more text")
        if id(inputs) not in clips:
            clips[id(inputs)] = METHODS[self.config.range](inputs.histogram, 8) if inputs.histogram.largest else 0.0
        return fmt.encode_static(weight_OI, clips[id(inputs)])


@dataclass(frozen=True)
class Smooth:
    """Scales junctions; everything stays dense."""

    config: SmoothConfig
    name: ClassVar[str] = "smooth"
    wanted: ClassVar[Wanted] = Wanted()
    changes_outputs: ClassVar[bool] = False

    def format_of(self, layer: str) -> Format:
        """See Method."""
        return DENSE

    def watched(self, part: Part) -> dict[str, Linear]:
        """See Method."""
        return part.linears()

    def treat(self, part: Part, seen: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """See Method. Channels that no token came through stay what they are."""
        junctions = part.junctions()
        maxima = {junction.name: largest_of(junction, seen) for junction in junctions}
        return smooth(part.model, maxima, self.config.alpha, self.config.norms_only, junctions)


def largest_of(junction: Junction, seen: Mapping[str, Inputs]) -> Tensor:
    """The largest magnitude of each channel that came to any reader, [C]; zeros where none was called."""
    found = [port.largest(seen[port.module].largest_I, junction.channels) for port in junction.readers if port.module in seen]
    return torch.stack(found).amax(0) if found else torch.zeros(junction.channels)


def mean_of(junction: Junction, seen: Mapping[str, Inputs]) -> Tensor:
    """The mean magnitude of each channel over all tokens that came to its readers, [C]."""
    called = [(port, seen[port.module]) for port in junction.readers if port.module in seen]
    total = sum(inputs.tokens for _, inputs in called)
    parts = [port.largest(inputs.mean_I, junction.channels) * (inputs.tokens / total) for port, inputs in called]
    return torch.stack(parts).sum(0)
