"""Which units of a model are worth the least: structured pruning (Molchanov, Mallya, Tyree, Frosio and Kautz, arXiv 1906.10771, section 3).

A unit's worth is the sum over its weights w of (g w)^2, the squared first-order estimate of what the loss changes without w; g is the
gradient of the loss, and the mean is taken over calibration rows. With F = mean g^2, the diagonal of the empirical Fisher information:

    worth(u) = sum over w of u of F w^2                               `magnitude`: the same with F = 1

First-order estimates do not see that two units do the same. So each unit is also held against those beside it: of the share

    spare(u, v) = sum over own w of u of F (w - w_v)^2 / sum over own w of u of F w^2        own: what a unit works with

nothing is left when v is its copy, and 1 is what cutting it costs; it is about 2 between units that have nothing in common. The worth
counts min(1, spare) times for the best v. Where spare is below 1, v does the work of both from then on (model/shrink.py) and is worth both.

Shape letters: U units of a block, W their weights, R some of the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import Cut
from lineshaft.model.units import Place, Units
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import Objective

Tensors = Mapping[str, Tensor]

ROWS_AT_ONCE = 1024
"""Units that are held against all others at a time."""


def squared_gradients(model: Decoder, batches: Iterable[Batch], objective: Objective) -> dict[str, Tensor]:
    """The mean over batches of the squared gradient of each parameter, float32; the loss of a batch is that of its mean target.

    A batch without targets counts as one without gradients. The model's own gradients are gone afterwards.
    """
    sums = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    count = 0
    model.requires_grad_(True)
    for batch in batches:
        count += 1
        model.zero_grad()
        targets = int((batch.targets_T != IGNORE).sum())
        (objective(model, batch).total / max(1, targets)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # an expert without tokens has none
                sums[name].addcmul_(parameter.grad, parameter.grad)
    model.zero_grad()
    model.requires_grad_(False)
    return {name: total.div_(max(1, count)) for name, total in sums.items()}


def evenly(model: Decoder) -> dict[str, Tensor]:
    """F = 1 for every parameter, in no memory: worth is then the squared magnitude."""
    return {name: torch.ones(()).expand(parameter.shape) for name, parameter in model.named_parameters()}


@torch.no_grad()
def least_worthy(model: Decoder, units: Units, fisher: Tensors, count: int) -> Cut:
    """The `count` units of a block, as many of each of its groups, to cut one after another; of equals the first."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    worth_U = worth(units, weights, fisher)
    siblings = _Siblings(_own(units, fisher), _own(units, weights)) if units.alike else None
    return Cut(units, _chosen(worth_U, siblings, units.groups, count))


def worth(units: Units, weights: Tensors, fisher: Tensors) -> Tensor:
    """Sum of F w^2 over each unit, without what its siblings can do as well; float32 [U]."""
    worth_U = torch.zeros(units.count)
    for place in (*units.own, *units.readers):
        if place.tensor in fisher:  # balancing biases only steer
            worth_U += _by_unit(fisher[place.tensor] * weights[place.tensor].float().square(), place, units.count).sum(1)
    for unit, names in enumerate(_of_members(units, fisher)):
        worth_U[unit] += sum(float((fisher[name] * weights[name].float().square()).sum()) for name in names)
    return worth_U


def _own(units: Units, tensors: Tensors) -> Tensor:
    """What each unit works with, [U, W]."""
    parts = [_by_unit(tensors[place.tensor].float(), place, units.count) for place in units.own if place.tensor in tensors]
    if units.members is not None:
        of_members = _of_members(units, tensors)
        parts.append(torch.stack([torch.cat([tensors[name].float().flatten() for name in names]) for names in of_members]))
    return torch.cat(parts, 1)


def _by_unit(tensor: Tensor, place: Place, count: int) -> Tensor:
    return tensor.movedim(place.axis, 0).reshape(count, -1)


def _of_members(units: Units, tensors: Tensors) -> list[list[str]]:
    """The tensors of the module that each unit is; nothing where units are no modules."""
    found: list[list[str]] = [[] for _ in range(units.count if units.members else 0)]
    for name in tensors if units.members else ():
        number = name.removeprefix(f"{units.members}.").partition(".")[0]
        if name.startswith(f"{units.members}.") and int(number) < units.count:  # prediction layers stand behind
            found[int(number)].append(name)
    return found


class _Siblings:
    """Holds units of a block against each other."""

    def __init__(self, fisher_UW: Tensor, weight_UW: Tensor) -> None:
        self.fisher_UW, self.weight_UW = fisher_UW, weight_UW

    def best(self, rows_R: Tensor, alive_U: Tensor) -> tuple[Tensor, Tensor]:
        """(spare, unit), both [R]: for some units the best of the others that are alive."""
        parts = [self._best(some_R, alive_U) for some_R in rows_R.chunk(-(-len(rows_R) // ROWS_AT_ONCE))]
        spares, places = zip(*parts, strict=True)
        return torch.cat(spares), torch.cat(places)

    def _best(self, rows_R: Tensor, alive_U: Tensor) -> tuple[Tensor, Tensor]:
        fisher_RW, weight_RW, weight_UW = self.fisher_UW[rows_R], self.weight_UW[rows_R], self.weight_UW
        alone_R = (fisher_RW * weight_RW.square()).sum(1)
        apart_RU = alone_R[:, None] - 2 * (fisher_RW * weight_RW) @ weight_UW.T + fisher_RW @ weight_UW.square().T
        spare_RU = (apart_RU.clamp(min=0) / alone_R[:, None]).nan_to_num(1.0, 1.0)  # of a dead unit there is nothing to spare
        spare_RU[:, ~alive_U] = torch.inf
        spare_RU[torch.arange(len(rows_R)), rows_R] = torch.inf
        return spare_RU.min(1)


def _chosen(worth_U: Tensor, siblings: _Siblings | None, groups: int, count: int) -> dict[int, int | None]:
    """Unit to stand-in, the least worthy first; worth and stand-ins are looked at anew after each."""
    every_U, alive_U, worth_U = torch.arange(len(worth_U)), torch.ones(len(worth_U), dtype=torch.bool), worth_U.clone()
    spare_U, best_U = torch.ones_like(worth_U), torch.zeros_like(every_U)
    if siblings is not None:
        spare_U, best_U = siblings.best(every_U, alive_U)
    left = [count // groups] * groups
    gone: dict[int, int | None] = {}
    for _ in range(count):
        open_U = alive_U & (torch.tensor(left).repeat_interleave(len(worth_U) // groups) > 0)
        unit = int((worth_U * spare_U.clamp(max=1)).masked_fill(~open_U, torch.inf).argmin())
        other = int(best_U[unit]) if spare_U[unit] < 1 else None
        gone[unit], alive_U[unit] = other, False
        left[unit // (len(worth_U) // groups)] -= 1
        if other is not None:
            worth_U[other] += worth_U[unit]
        stale_R = every_U[alive_U & (best_U == unit)]
        if siblings is not None and len(stale_R):
            spare_U[stale_R], best_U[stale_R] = siblings.best(stale_R, alive_U)
    return gone
