"""What the ops of a mixture of experts are given: the rule of the choice, in words and in PyTorch, and the weights of all experts.

Shape letters as in reference.py; X bytes of a packed weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.ops.packing import Shape


@dataclass(frozen=True)
class Rule:
    """How a router chooses among its experts and weights them (model/config.MixtureOfExperts says what each is)."""

    top: int
    sigmoid: bool
    """Affinities are sigmoids, and a group is as good as its best two experts; else softmax, and its best one."""
    groups: int = 1
    best_groups: int = 1
    normalise: bool = True
    scaling: float = 1.0


@dataclass(frozen=True)
class Feeds:
    """SwiGLU blocks of one shape, packed."""

    gates: tuple[Tensor, ...]
    """uint8 [X] of each expert."""
    ups: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    wide: Shape
    """Of gates and ups."""
    down: Shape
    wide_whole: bool = False
    """Activations are rounded to 8 bits, as in `reference_packed.packed_linear`."""
    down_whole: bool = False


def affinity(logits_TE: Tensor, rule: Rule) -> Tensor:
    """How near a token is to each expert."""
    return logits_TE.sigmoid() if rule.sigmoid else logits_TE.softmax(-1)


def routed(affinity_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """`reference.route` from the affinities on."""
    choice_TE = affinity_TE.detach() if bias_E is None else affinity_TE.detach() + bias_E
    expert_TK = within_groups(choice_TE, rule).topk(rule.top, sorted=False).indices
    weight_TK = affinity_TE.gather(1, expert_TK)
    if rule.normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * rule.scaling, expert_TK


def within_groups(choice_TE: Tensor, rule: Rule) -> Tensor:
    """Rule out experts outside the best groups.

    A group is as good as the sum of its best two experts (DeepSeek-V3), or with softmax as its best one (DeepSeek-V2).
    """
    if rule.groups == 1:
        return choice_TE
    grouped_TGE = choice_TE.view(len(choice_TE), rule.groups, -1)
    worth_TG = grouped_TGE.topk(2 if rule.sigmoid else 1, -1).values.sum(-1)
    groups = worth_TG.topk(rule.best_groups, -1, sorted=False).indices
    keep_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, groups, True)
    return grouped_TGE.masked_fill(~keep_TG[:, :, None], -torch.inf).flatten(1)
