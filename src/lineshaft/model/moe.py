"""Mixture of experts with a sigmoid router and a balancing bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.ffn import FeedForward


class Router(nn.Module):
    """Chooses experts for each token and weights them."""

    __call__: Callable[..., tuple[Tensor, Tensor]]
    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, hidden: int, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, hidden))
        # Steers the choice only, never the weights; moved by `rebalance`, not by gradients.
        self.register_buffer("e_score_correction_bias", torch.zeros(moe.n_routed_experts))
        # Tokens sent to each expert since the last `rebalance`; counted while training.
        self.register_buffer("load", torch.zeros(moe.n_routed_experts), persistent=False)

    def forward(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top] in float32 and experts [T, top] of each token."""
        with torch.autocast(x_TI.device.type, enabled=False):
            affinity_TE = F.linear(x_TI.float(), self.weight.float()).sigmoid()
        choice_TE = self._within_groups(affinity_TE.detach() + self.e_score_correction_bias)
        expert_TK = choice_TE.topk(self.moe.num_experts_per_tok, sorted=False).indices
        weight_TK = affinity_TE.gather(1, expert_TK)
        if self.moe.norm_topk_prob:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.load += torch.bincount(expert_TK.flatten(), minlength=len(self.load))
        return weight_TK * self.moe.routed_scaling_factor, expert_TK

    def _within_groups(self, choice_TE: Tensor) -> Tensor:
        """Rule out experts outside the best groups; a group is as good as the sum of its best two experts."""
        if self.moe.n_group == 1:
            return choice_TE
        grouped_TGE = choice_TE.view(len(choice_TE), self.moe.n_group, -1)
        best_two_TG = grouped_TGE.topk(2, -1).values.sum(-1)
        groups = best_two_TG.topk(self.moe.topk_group, -1, sorted=False).indices
        keep_TG = torch.zeros_like(best_two_TG, dtype=torch.bool).scatter_(1, groups, True)
        return grouped_TGE.masked_fill(~keep_TG[:, :, None], -torch.inf).flatten(1)

    def rebalance(self, speed: float) -> None:
        """Move the bias by `speed` towards equal load and forget the counts (section 2.1.2, auxiliary-loss-free)."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class ExpertBlock(nn.Module):
    """Routed experts and a shared one."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.gate = Router(hidden, moe)
        self.experts = nn.ModuleList(FeedForward(hidden, moe.moe_intermediate_size) for _ in range(moe.n_routed_experts))
        self.shared_experts = FeedForward(hidden, moe.moe_intermediate_size * moe.n_shared_experts) if moe.n_shared_experts else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        weight_TK, expert_TK = self.gate(x_TI)
        out = self._routed(x_TI, weight_TK.to(x_TI.dtype), expert_TK)
        return out if self.shared_experts is None else out + self.shared_experts(x_TI)

    def _routed(self, x_TI: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert, run each expert once over its run, put the results back in place."""
        tokens, top = expert_TK.shape
        order = expert_TK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_TK.flatten(), minlength=len(self.experts)).tolist()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        pairs = x_TI[:, None].expand(-1, top, -1).reshape(tokens * top, -1)
        runs = zip(self.experts, permuted(pairs, order, back).split_with_sizes(counts), strict=True)
        sorted_y = torch.cat([expert(run) for expert, run in runs if len(run)])
        y_TKI = permuted(sorted_y, back, order).view(tokens, top, -1)
        return (y_TKI * weight_TK[:, :, None]).sum(1)


def permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order] for a permutation `order` of the rows, `back` being its inverse.

    Autograd's own gradient of x[order] adds into rows one by one; a permutation's is the way back, several times faster.
    """
    rows: Tensor = _Permute.apply(x, order, back)  # type: ignore[no-untyped-call] # torch leaves Function.apply untyped
    return rows


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back], None, None
