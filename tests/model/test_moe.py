"""Gradients of experts against a loop over tokens; the router against its own rule; the permuted gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from experts import HIDDEN, block_of, token_by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import agree

from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.moe import permuted

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
