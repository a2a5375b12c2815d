"""Rounding that makes up for its own errors: GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, arXiv 2210.17323, algorithm 1).

Inputs are rounded one after another. The error of each is spread over those not rounded yet, in the way that changes the
layer's outputs on calibration inputs least. With H = sum x x^T + damping, and U upper triangular with H^-1 = U^T U, input j with
its error e_j = (w_j - q_j) / U_jj takes e_j U_jk from each later input k.

Shape letters: I inputs, O outputs, G groups of inputs that share a scale, B inputs of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.ops.formats import Integer

Order = Literal["none", "activation"]

BLOCK = 128
"""Inputs after which later ones learn of the errors at once (the paper's lazy batches)."""
COPIES = 4
"""Float64 matrices as large as the Hessian that `Factor.of` holds at once, at most."""


@dataclass(frozen=True)
class Factor:
    """What rounding needs to know of a layer's inputs; layers that read the same share it."""

    order_I: Tensor
    """In which order inputs are rounded, int64."""
    upper_II: Tensor
    """U of H^-1 = U^T U in that order, float32."""
    moving: bool
    """Inputs are rounded as they stand, so a group's scale is found when the group is reached."""

    @classmethod
    def of(cls, hessian_II: Tensor, damp: float = 0.01, order: Order = "none") -> Factor:
        """hessian_II: sum of x x^T over calibration inputs, float32 or float64; a factor does not matter. damp: what is added to its
        diagonal, as a share of the diagonal's mean; tenfold as long as the factorisation fails, up to 1.

        order "none" rounds inputs as they stand. A group's scale is then found when the group is reached, from the weight as changed
        so far (the paper's section 4): what is rounded is what the scale was made for. "activation" rounds inputs of the largest mean
        square first, while more are left to make up for them. Groups stay as they stand, hence scales are those of the weight as
        given (compressed-tensors' "static"): no order has to be stored.

        Raises ConfigError for a damping outside (0, 1], and a Hessian that is not finite, or not positive definite with the largest
        damping.
        """
        hessian_II = _checked(hessian_II)
        order_I = torch.arange(len(hessian_II), device=hessian_II.device)
        if order == "activation":
            order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
            hessian_II = hessian_II[order_I][:, order_I]
        return cls(order_I, _factor(hessian_II, damp).to(torch.float32), order == "none")


def gptq(weight_OI: Tensor, factor: Factor, fmt: Integer, block: int = BLOCK) -> dict[str, Tensor]:
    """The tensors of `fmt` for a dense weight, rounded so that its outputs on the calibration inputs change little.

    block: see BLOCK, a matter of speed only; made a multiple of the group, or as large. An input that was always zero is rounded to
    nearest. Raises ConfigError for a shape that does not fit.
    """
    outputs, inputs = weight_OI.shape
    width = inputs // fmt.groups(inputs)
    if len(factor.order_I) != inputs:
        raise ConfigError(f"a weight of {inputs} inputs needs a Hessian [{inputs}, {inputs}], not one of {len(factor.order_I)}")
    weight_OI = weight_OI.detach().float()
    scale_OG, zero_OG = fmt.scale_and_zero(weight_OI.reshape(outputs, -1, width))
    grid = _Grid(fmt, width, scale_OG.T.contiguous(), zero_OG.T.contiguous(), factor.moving)
    unit = fmt.group or 1  # a group that a block cut in two would be found from inputs that have not learnt of all errors
    codes_IO = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight_OI.device)
    order_I = factor.order_I
    codes_IO[order_I] = _rounded(weight_OI.T[order_I].contiguous(), factor.upper_II, grid, order_I.tolist(), max(block // unit, 1) * unit)
    return fmt.store(codes_IO.T.contiguous(), grid.scale_GO.T.contiguous(), grid.zero_GO.T.contiguous())


@dataclass
class _Grid:
    """The multiples that weights are rounded to."""

    fmt: Integer
    width: int
    """Inputs of a group."""
    scale_GO: Tensor
    zero_GO: Tensor
    moving: bool
    """A group's scale is found again when the group is reached; inputs come in their order then."""

    def round(self, weight_IO: Tensor, place: int, input_: int) -> tuple[Tensor, Tensor]:
        """(codes, multiples) nearest to row `place`, which is this input; uint8 and float32 [O]."""
        group = input_ // self.width
        if self.moving and not input_ % self.width:
            scale_O1, zero_O1 = self.fmt.scale_and_zero(weight_IO[place : place + self.width].T[:, None])
            self.scale_GO[group], self.zero_GO[group] = scale_O1[:, 0], zero_O1[:, 0]
        scale_O, zero_O = self.scale_GO[group].float(), self.zero_GO[group]
        codes_O = self.fmt.nearest(weight_IO[place], scale_O, zero_O)
        return codes_O, (codes_O.float() - zero_O).mul_(scale_O)


def _rounded(weight_IO: Tensor, factor_II: Tensor, grid: _Grid, order: list[int], block: int) -> Tensor:
    """The code of each weight, uint8 [I, O]; changes the weight. A row a column of the paper's: neighbours in memory."""
    codes_IO = torch.empty_like(weight_IO, dtype=torch.uint8)
    for first in range(0, len(order), block):
        last = min(first + block, len(order))
        error_BO = torch.empty_like(weight_IO[first:last])
        for place in range(first, last):
            codes_IO[place], nearest_O = grid.round(weight_IO, place, order[place])
            error_O = torch.div(weight_IO[place] - nearest_O, factor_II[place, place], out=error_BO[place - first])
            weight_IO[place + 1 : last].addr_(factor_II[place, place + 1 : last], error_O, alpha=-1)
        weight_IO[last:].addmm_(factor_II[first:last, last:].T, error_BO, alpha=-1)
    return codes_IO


def _checked(hessian_II: Tensor) -> Tensor:
    """In float64, with inputs that were always zero made like the average one: they have no company, so nothing comes of it."""
    if hessian_II.ndim != 2 or hessian_II.shape[0] != hessian_II.shape[1]:
        raise ConfigError(f"a Hessian is square, not {list(hessian_II.shape)}")
    if not torch.isfinite(hessian_II).all():
        raise ConfigError("the Hessian holds what is not a number or infinite: look for such activations among the calibration inputs")
    hessian_II = hessian_II.to(torch.float64, copy=True)
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1.0 if dead_I.all() else diagonal_I[~dead_I].mean()
    return hessian_II


def _factor(hessian_II: Tensor, damp: float) -> Tensor:
    """U of H^-1 = U^T U, found without the inverse: H = R R^T with R upper triangular (Cholesky from the last row on), U = R^-1."""
    if not 0 < damp <= 1:
        raise ConfigError(f"damp: {damp} is not a share above 0 and up to 1")
    while True:
        damped_II = hessian_II.flip(0, 1)
        damped_II.diagonal().add_(damp * hessian_II.diagonal().mean())
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II  # each of these is twice the Hessian: see COPIES
        if not failed:
            upper_II = lower_II.flip(0, 1)
            del lower_II
            identity_II = torch.eye(len(hessian_II), dtype=hessian_II.dtype, device=hessian_II.device)
            factor_II: Tensor = torch.linalg.solve_triangular(upper_II, identity_II, upper=True)
            return factor_II
        if damp == 1:
            raise ConfigError(
                "the Hessian is not positive definite with its own mean on top: it must be a sum of x x^T over calibration inputs"
            )
        damp = min(10 * damp, 1.0)
