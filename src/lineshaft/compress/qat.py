"""Training with rounded weights: a format whose product is that of an integer format, and which keeps gradients.

Each product rounds the dense weight to the grid that the integer format will store, FP16 scale included. Gradients go straight
through the rounding inside the range. The range is learnt: LSQ (Esser, McKinstry, Bablani, Appuswamy and Modha, arXiv 1902.08153,
section 2) for the scale, in the logarithmic domain, where it stays positive (Jain, Gural, Wu and Dick, arXiv 1903.08066, section 3.2);
and the place of zero (Bhalgat, Lee, Nagel, Blankevoort and Kwak, arXiv 2004.09576, section 3.1).

Shape letters: T tokens, O outputs, I inputs, G groups of inputs that share a scale, X all groups of a weight: O times G, outputs first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineshaft.base.errors import ConfigError
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.layers import chosen
from lineshaft.compress.ranges import METHODS, Histogram
from lineshaft.model.decoder import Decoder
from lineshaft.ops import table
from lineshaft.ops.formats import Integer
from lineshaft.ops.integers import rounded

Tensors = Mapping[str, Tensor]

_SMALLEST_FP16, _LARGEST_FP16 = 2.0**-24, 65504.0
_BINS = 1024
"""Of a layer's histogram: eight a step at 8 bits."""


@dataclass(frozen=True)
class FakeInteger:
    """An integer format while it is trained: the weight stays dense, the product uses what the integers would give.

    weight: float32 [O, I]. log_scale: float32 [X], the natural logarithm of each scale before it is rounded to FP16. shift, where there
    are zero points: float32 [X], the code of zero as a share of the largest code. All are parameters; those of ranges are flat, so that
    the optimiser, which lets matrices decay, leaves them alone.
    """

    real: Integer
    """What will be stored."""
    clip: str = "mse"
    """How ranges begin: one of compress.ranges.METHODS."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """See Format."""
        return ("weight", "log_scale") if self.real.symmetric else ("weight", "log_scale", "shift")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.real.bits) - 1

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format; the tensors are parameters. Raises ConfigError also for weights that are not finite."""
        weight_OI = weight_OI.detach().float()
        grouped_OGI = weight_OI.reshape(len(weight_OI), self.real.groups(weight_OI.shape[1]), -1)
        if not torch.isfinite(grouped_OGI).all():
            raise ConfigError("a weight is not a number or infinite")
        scale_OG, zero_OG = self.real.scale_and_zero(clipped(grouped_OGI, self.clip, self.real))
        tensors = {"weight": weight_OI, "log_scale": scale_OG.float().log().flatten(), "shift": zero_OG.float().flatten() / self.top}
        return {name: nn.Parameter(tensors[name]) for name in self.tensor_names}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        ranges = outputs * self.real.groups(inputs)
        shapes = {"weight": (outputs, inputs), "log_scale": (ranges,), "shift": (ranges,)}
        return {name: nn.Parameter(torch.empty(shapes[name])) for name in self.tensor_names}

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format: to the bit what the stored integers decode to."""
        rounded_OI: Tensor = _Rounded.apply(self, tensors["weight"], tensors["log_scale"], tensors.get("shift"))  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
        return rounded_OI.to(dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format. Where activations are rounded, the integers' own product takes another order of sums (reference.linear_int_a8)."""
        if self.real.activations is not None:
            x_TI = _RoundedTokens.apply(x_TI)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
        return table.linear(x_TI, self.decode(tensors, x_TI.dtype), bias_O)

    def describe(self) -> str:
        """See Format."""
        return f"{self.real.describe()}, in training"

    @torch.no_grad()
    def stored(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors of the integer format: what the product used until now."""
        scale_OG, zero_OG = self.grid(tensors)
        grouped_OGI = tensors["weight"].detach().reshape(*scale_OG.shape, -1)
        codes_OGI = self.real.nearest(grouped_OGI, scale_OG[:, :, None], zero_OG[:, :, None])
        return self.real.store(codes_OGI.flatten(1), scale_OG, zero_OG)

    @torch.no_grad()
    def grid(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Scale and code of zero of each group as they will be stored, float16 and uint8 [O, G]."""
        outputs = len(tensors["weight"])
        scale_OG = tensors["log_scale"].exp().clamp(_SMALLEST_FP16, _LARGEST_FP16).to(torch.float16).view(outputs, -1)
        if "shift" not in tensors:
            return scale_OG, torch.full(scale_OG.shape, 1 << (self.real.bits - 1), dtype=torch.uint8, device=scale_OG.device)
        return scale_OG, (tensors["shift"] * self.top).round().clamp(0, self.top).to(torch.uint8).view(outputs, -1)


class _Rounded(torch.autograd.Function):
    """A weight to the nearest of its grid.

    With v = w / scale and codes between n and p around that of zero: gradients of w where n < v < p, as they came; of the scale
    round(v) - v there, n or p outside (LSQ, equation 3); of the code of zero -scale outside. Those of ranges are multiplied by
    1 / sqrt(weights that share the range * p) (section 2.2), p being that of symmetric codes: else clipping of the whole gradient
    would be ruled by a few ranges.
    """

    @staticmethod
    def forward(ctx: Any, fmt: FakeInteger, weight_OI: Tensor, log_scale_X: Tensor, shift_X: Tensor | None) -> Tensor:
        tensors = {"weight": weight_OI, "log_scale": log_scale_X} | ({} if shift_X is None else {"shift": shift_X})
        scale_OG, zero_OG = fmt.grid(tensors)
        scale_OG1, zero_OG1 = scale_OG.float()[:, :, None], zero_OG.float()[:, :, None]
        ctx.fmt = fmt
        ctx.save_for_backward(weight_OI, scale_OG1, zero_OG1)
        codes_OGI = fmt.real.nearest(weight_OI.reshape(*scale_OG.shape, -1), scale_OG1, zero_OG1)
        return codes_OGI.float().sub_(zero_OG1).mul_(scale_OG1).view_as(weight_OI)

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scale_OG1, zero_OG1 = ctx.saved_tensors
        top = ctx.fmt.top
        steps_OGI = weight_OI.reshape(*scale_OG1.shape[:2], -1) / scale_OG1
        inside_OGI = (steps_OGI > -zero_OG1) & (steps_OGI < top - zero_OG1)
        grad_OGI = grad_OI.reshape(steps_OGI.shape)
        balance = (steps_OGI.shape[-1] * (top // 2)) ** -0.5
        slope_OGI = torch.where(inside_OGI, steps_OGI.round() - steps_OGI, steps_OGI.clamp(-zero_OG1, top - zero_OG1))
        log_scale_X = ((grad_OGI * slope_OGI).sum(-1, keepdim=True) * scale_OG1 * balance).flatten()
        shift_X = None
        if ctx.needs_input_grad[3]:
            shift_X = ((grad_OGI * ~inside_OGI).sum(-1, keepdim=True) * scale_OG1 * (-top * balance)).flatten()
        return None, (grad_OGI * inside_OGI).view_as(weight_OI), log_scale_X, shift_X


class _RoundedTokens(torch.autograd.Function):
    """Activations to 8 bits, one scale a token found from the token (ops.integers.rounded); nothing is clipped, so gradients stay."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor) -> Tensor:
        q_TI, scale_T1 = rounded(x_TI)
        return q_TI.mul_(scale_T1).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> Tensor:
        return grad_TI


def clipped(grouped_OGI: Tensor, method: str, fmt: Integer) -> Tensor:
    """The weights [O, G, inputs of a group], cut where a method of compress.ranges would clip.

    One histogram a layer: of |w| as a share of its group's largest (with zero points, of the distance from the middle of the
    group's range), so the whole layer gives up the same share of every group's range. One a group would have too few numbers.
    """
    least_OG1, largest_OG1 = grouped_OGI.amin(-1, keepdim=True).clamp_(max=0), grouped_OGI.amax(-1, keepdim=True).clamp_(min=0)
    if fmt.symmetric:
        middle_OG1, half_OG1 = torch.zeros_like(least_OG1), torch.maximum(-least_OG1, largest_OG1)
    else:
        middle_OG1, half_OG1 = (least_OG1 + largest_OG1) / 2, (largest_OG1 - least_OG1) / 2
    histogram = Histogram(_BINS)
    histogram.add(((grouped_OGI - middle_OG1) / half_OG1.masked_fill(half_OG1 == 0, 1.0)).clamp_(-1, 1))
    share = METHODS[method](histogram, fmt.bits)
    if share in (0.0, histogram.largest):  # nothing but zeros, or nothing to be cut
        return grouped_OGI
    return torch.minimum(torch.maximum(grouped_OGI, middle_OG1 - share * half_OG1), middle_OG1 + share * half_OG1)


def begin(model: Decoder, config: CompressConfig, clip: str = "mse") -> list[str]:
    """Round what the config chooses from now on, in training; the names of these layers.

    Embeddings, norms, routers and gates are no linear layers and stay as they are. Raises ConfigError as `layers.chosen` does, and
    naming a layer that does not fit its format.
    """
    layers = chosen(model, config, "qat")
    for name, linear in layers.items():
        coding = config.coding_of(name)
        assert isinstance(coding, Integer)
        try:
            linear.recode(FakeInteger(coding, clip))
        except ConfigError as error:
            raise ConfigError(f"qat: {name}: {error}; or add it to skip") from None
    return sorted(layers)


@dataclass(frozen=True)
class Learnt:
    """What training left of a layer."""

    format: FakeInteger
    tensors: Tensors

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The weight that the product used, float32 [O, I]."""
        return self.format.decode(self.tensors, torch.float32)


def finish(model: Decoder) -> dict[str, Learnt]:
    """Store the integers that training ended with, in place; what was learnt, by layer, for a proof of what is then written."""
    learnt: dict[str, Learnt] = {}
    for name, linear in model.linears().items():
        if isinstance(fmt := linear.format, FakeInteger):
            learnt[name] = Learnt(fmt, linear.tensors())
            linear.hold(fmt.real, fmt.stored(learnt[name].tensors))
    return learnt
