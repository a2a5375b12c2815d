"""Experts against a loop over tokens; the router against its own rule; the permuted gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import agree

from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.moe import ExpertBlock, permuted

HIDDEN = 10


def block_of(moe: MixtureOfExperts, seed: int) -> ExpertBlock:
    block = ExpertBlock(HIDDEN, moe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*block.parameters(), block.gate.e_score_correction_bias]:
            tensor.normal_(0, 0.4, generator=generator)
    return block


def token_by_token(block: ExpertBlock, x_TI: Tensor) -> Tensor:
    """DeepSeek-V3, equations 12 to 16, in float64, one token and one expert at a time."""
    moe, rows = block.gate.moe, []

    def swiglu(feed: torch.nn.Module, x: Tensor) -> Tensor:
        gate, up, down = (getattr(feed, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))

    for x in x_TI.double():
        affinity = 1 / (1 + (-(block.gate.weight.double() @ x)).exp())
        choice = (affinity + block.gate.e_score_correction_bias.double()).tolist()
        size = moe.n_routed_experts // moe.n_group
        groups = [list(range(first, first + size)) for first in range(0, moe.n_routed_experts, size)]
        groups.sort(key=lambda group: -sum(sorted((choice[expert] for expert in group), reverse=True)[:2]))
        reachable = [expert for group in groups[: moe.topk_group] for expert in group]
        chosen = sorted(reachable, key=lambda expert: -choice[expert])[: moe.num_experts_per_tok]
        whole = sum(affinity[expert] for expert in chosen) if moe.norm_topk_prob else 1.0
        y = sum(moe.routed_scaling_factor * affinity[expert] / whole * swiglu(block.experts[expert], x) for expert in chosen)
        rows.append(y if block.shared_experts is None else y + swiglu(block.shared_experts, x))
    return torch.stack(rows)


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOfExperts:
    groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(1 if groups == 1 else 2, 4))
    kept = draw(st.integers(1, groups))
    return MixtureOfExperts(
        n_routed_experts=groups * size,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        n_shared_experts=draw(st.integers(0, 2)),
        moe_intermediate_size=draw(st.integers(1, 6)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=60)
@given(moe=mixtures(), tokens=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_experts_do_what_a_loop_over_tokens_does(moe: MixtureOfExperts, tokens: int, seed: int) -> None:
    block = block_of(moe, seed)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    with torch.inference_mode():
        assert agree(block(x).double(), token_by_token(block, x))


MOE = MixtureOfExperts(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=4, n_group=3, topk_group=2)


def test_gradients_are_those_of_the_loop() -> None:
    """Of every weight and of the input; the loop is plain autograd in float64."""
    block = block_of(MOE, 0)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seen = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad((block(x) * seen).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((token_by_token(block, x) * seen).sum(), wanted, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        empty = mine is None or other is None
        assert (mine is None) == (other is None) if empty else agree(mine, other)


@settings(max_examples=20)
@given(order=st.integers(1, 40).flatmap(lambda count: st.permutations(range(count))))
def test_the_gradient_of_permuted_rows_is_autograds(order: list[int]) -> None:
    order_N = torch.tensor(order)
    back = order_N.argsort()
    x = torch.randn(len(order), 3, requires_grad=True)
    weight = torch.randn(len(order), 3)
    assert torch.equal(permuted(x, order_N, back), x[order_N])
    (ours,) = torch.autograd.grad((permuted(x, order_N, back) * weight).sum(), x)
    (plain,) = torch.autograd.grad((x[order_N] * weight).sum(), x)
    assert torch.equal(ours, plain)


def test_rebalancing_helps_the_starved_and_hinders_the_crowded() -> None:
    router = block_of(MOE, 0).gate
    with torch.no_grad():
        router.e_score_correction_bias.zero_()
    router.load.copy_(torch.tensor([10.0, 0, 4, 4, 2, 4]))
    router.rebalance(0.01)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0.01, 0])
    assert router.load.tolist() == [0] * 6


def test_loads_are_counted_in_training_only_and_rebalancing_evens_them() -> None:
    router = block_of(MixtureOfExperts(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=4), 3).gate
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    router.eval()
    with torch.no_grad():
        router(x)
        assert router.load.sum() == 0
        router.train()
        router(x)
        first = router.load.clone()
        for _ in range(300):
            router.rebalance(0.005)
            router(x)
    assert first.sum() == router.load.sum() == 400
    assert first.std() > 30
    assert router.load.std() < first.std() / 4


def test_the_bias_gets_no_gradient_and_the_router_weight_does() -> None:
    block = block_of(MOE, 0)
    block(torch.randn(5, HIDDEN)).sum().backward()
    assert block.gate.weight.grad is not None
    assert block.gate.weight.grad.abs().sum() > 0
    assert not block.gate.e_score_correction_bias.requires_grad
