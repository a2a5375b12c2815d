"""The oracle of experts: every kind of router and expert as a loop over single tokens in float64, written from the papers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.moe import ExpertBlock

HIDDEN = 10


def block_of(moe: MixtureOfExperts, seed: int) -> ExpertBlock:
    block = ExpertBlock(HIDDEN, moe)
    generator = torch.Generator().manual_seed(seed)
    bias = block.gate.e_score_correction_bias
    with torch.no_grad():
        for tensor in [*block.parameters(), *([] if bias is None else [bias])]:
            tensor.normal_(0, 0.4, generator=generator)
    return block


def swiglu(feed: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = (getattr(feed, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    hidden = gate @ x
    return down @ (hidden / (1 + (-hidden).exp()) * (up @ x))


def affinities(block: ExpertBlock, x: Tensor) -> Tensor:
    """DeepSeek-V3 equation 15, or Mixtral section 2.1."""
    logits = block.gate.weight.double() @ x
    if block.gate.moe.scoring_func == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return logits.exp() / logits.exp().sum()


def chosen_of(block: ExpertBlock, affinity: Tensor) -> list[int]:
    """DeepSeek-V3 equation 16 with node-limited routing (section 2.1.2); DeepSeek-V2 judges a group by its best expert alone."""
    moe, bias = block.gate.moe, block.gate.e_score_correction_bias
    choice = [score + (0.0 if bias is None else bias[expert].item()) for expert, score in enumerate(affinity.tolist())]
    size, judges = moe.n_routed_experts // moe.n_group, 2 if moe.scoring_func == "sigmoid" else 1
    groups = [list(range(first, first + size)) for first in range(0, moe.n_routed_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((choice[expert] for expert in group), reverse=True)[:judges]))
    reachable = [expert for group in groups[: moe.topk_group] for expert in group]
    return sorted(reachable, key=lambda expert: -choice[expert])[: moe.num_experts_per_tok]


def parts(block: ExpertBlock, x: Tensor) -> Iterator[Tensor]:
    """Everything that is added up for one token."""
    moe, affinity = block.gate.moe, affinities(block, x)
    chosen = chosen_of(block, affinity)
    whole = sum(affinity[expert] for expert in chosen) if moe.norm_topk_prob else 1.0
    for expert in chosen:
        yield moe.routed_scaling_factor * affinity[expert] / whole * swiglu(block.experts[expert], x)
    if block.shared_experts is not None:
        yield swiglu(block.shared_experts, x)
    if block.shared_expert is not None and block.shared_expert_gate is not None:
        yield 1 / (1 + (-(block.shared_expert_gate.weight.double() @ x)).exp()) * swiglu(block.shared_expert, x)
    for added in block.added_experts:
        yield (added.gate.weight.double() @ x) * swiglu(added.expert, x)


def token_by_token(block: ExpertBlock, x_TI: Tensor) -> Tensor:
    """[T, hidden] to [T, hidden] in float64, with gradients."""
    return torch.stack([torch.stack(list(parts(block, x))).sum(0) for x in x_TI.double()])
