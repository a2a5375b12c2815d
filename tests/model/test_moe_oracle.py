"""Every kind of router and expert against a loop over single tokens in float64, written from the papers; and what must fail it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from experts import HIDDEN, block_of, token_by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import Theirs, agree, logits_of, prompt

from lineshaft.base.errors import ConfigError
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.grow import add_experts
from lineshaft.model.moe import ExpertBlock
from lineshaft.ops import table

Get = Callable[[str], Theirs]
SOFTMAX = MixtureOfExperts(
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=0, scoring_func="softmax", norm_topk_prob=True
)
"""Mixtral's."""


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOfExperts:
    scoring, groups = draw(st.sampled_from(["sigmoid", "softmax"])), draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(1 if groups == 1 or scoring == "softmax" else 2, 4))
    kept = draw(st.integers(1, groups))
    return MixtureOfExperts(
        n_routed_experts=groups * size,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        scoring_func=scoring,
        n_shared_experts=draw(st.integers(0, 2)),
        shared_expert_intermediate_size=draw(st.sampled_from([0, 5])),
        n_added_experts=draw(st.integers(0, 2)),
        moe_intermediate_size=draw(st.integers(1, 6)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=80)
@given(moe=mixtures(), tokens=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_experts_of_every_kind_do_what_a_loop_over_tokens_does(moe: MixtureOfExperts, tokens: int, seed: int) -> None:
    block = block_of(moe, seed)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    with torch.inference_mode():
        assert agree(block(x).double(), token_by_token(block, x))


class SeedsRouter:
    """The form that must not come back, here over our weights, so that only what it does with them differs."""

    def __init__(self, block: ExpertBlock, *, repaired: str = "") -> None:
        self.block, self.repaired, self.top_k = block, repaired, block.gate.moe.num_experts_per_tok

    def __call__(self, x_TI: Tensor) -> Tensor:
        scores = x_TI @ self.block.gate.weight.T  # neither softmax nor sigmoid
        weights, experts = scores.topk(self.top_k, -1)
        if self.repaired:
            weights = scores.softmax(-1).gather(1, experts)
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x_TI)
        for token, x in enumerate(x_TI):
            for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
                inside = self.repaired != "softmax, outputs scaled"
                y = self.block.experts[expert](weight * x) if inside else weight * self.block.experts[expert](x)
                out[token] += y
        return out if self.repaired == "softmax, outputs scaled" else out / self.top_k


@pytest.mark.parametrize("repaired", ["", "softmax"])
def test_the_form_that_scales_inputs_by_raw_scores_and_divides_by_their_number_fails(repaired: str) -> None:
    block = block_of(SOFTMAX, 0)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = token_by_token(block, x)
        assert agree(block(x).double(), expected)
        assert not agree(SeedsRouter(block, repaired=repaired)(x).double(), expected, 1e-2)


def test_that_form_with_all_its_mistakes_mended_passes() -> None:
    """So the test above fails it for these mistakes and not for being written differently."""
    block = block_of(SOFTMAX, 0)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert agree(SeedsRouter(block, repaired="softmax, outputs scaled")(x).double(), token_by_token(block, x))


def test_that_form_takes_no_more_than_one_token() -> None:
    """It indexed its experts with the tensor of all tokens' choices."""
    block = block_of(SOFTMAX, 0)
    _, experts = (torch.randn(3, HIDDEN) @ block.gate.weight.T).topk(2, -1)
    with pytest.raises(TypeError, match="only integer tensors"):
        block.experts[experts[:, 0]]


def steady_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """Not by PyTorch's products of one row, whose bits hang on where in its file a weight lies."""
    with table.steady():
        return logits_of(model, tokens)


@pytest.mark.parametrize("name", ["deepseek-groups", "deepseek_v2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_added_experts_change_no_bit_until_their_gates_open(name: str, theirs: Get, tmp_path: Path) -> None:
    model, tokens = load_checkpoint(theirs(name).folder), prompt(20)
    before, blocks = steady_logits(model, tokens), [module for module in model.modules() if isinstance(module, ExpertBlock)]
    add_experts(model, 2, seed=3)
    assert all(len(block.added_experts) == 2 for block in blocks)
    assert all(parameter.abs().sum() > 0 for added in blocks[0].added_experts for parameter in added.expert.parameters())
    assert torch.equal(steady_logits(model, tokens), before)
    save_checkpoint(model, tmp_path, theirs(name).folder)
    again = load_checkpoint(tmp_path)
    assert again.config.moe is not None
    assert again.config.moe.n_added_experts == 2
    assert torch.equal(steady_logits(again, tokens), before)
    with torch.no_grad():
        blocks[-1].added_experts[1].gate.weight.fill_(100.0)
    assert not agree(logits_of(model, tokens), before, 1e-3)


def test_an_added_experts_gate_has_a_gradient_while_it_is_shut() -> None:
    """Gate and expert can't both start at zero, or nothing would ever move."""
    block = block_of(SOFTMAX.model_copy(update={"n_added_experts": 1}), 0)
    with torch.no_grad():
        block.added_experts[0].gate.weight.zero_()
    block(torch.randn(5, HIDDEN)).sum().backward()
    grad = block.added_experts[0].gate.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_what_other_tools_can_not_know_they_do_not_load_as_something_else(theirs: Get, tmp_path: Path) -> None:
    model = load_checkpoint(theirs("mixtral").folder)
    add_experts(model, 1, seed=0)
    save_checkpoint(model, tmp_path, theirs("mixtral").folder)
    with pytest.raises(ValueError, match="lineshaft"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("name", ["deepseek", "mixtral", "qwen3_moe"])
def test_another_number_of_active_experts_is_that_of_the_loop_and_of_transformers(name: str, active: int, theirs: Get) -> None:
    model = load_checkpoint(theirs(name).folder, active_experts=active)
    assert model.config.moe is not None
    assert model.config.moe.num_experts_per_tok == active
    block = next(module for module in model.modules() if isinstance(module, ExpertBlock))
    x = torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert agree(block(x).double(), token_by_token(block, x))
    assert agree(logits_of(model, prompt(20)), with_active(theirs(name), active).logits(prompt(20)))


def with_active(model: Theirs, active: int) -> Theirs:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.folder, num_experts_per_tok=active)
    return Theirs(model.folder, loaded.eval())


@pytest.mark.parametrize(("name", "active"), [("mixtral", 1), ("qwen3_moe", 1), ("deepseek", 1)])
def test_fewer_active_experts_do_less_work(name: str, active: int, theirs: Get) -> None:
    """What is spared is the same share of the experts' work as of the experts."""
    model = load_checkpoint(theirs(name).folder)
    fewer = load_checkpoint(theirs(name).folder, active_experts=active)
    moe, layers = model.config.moe, len(model.routers())
    assert moe is not None
    spared = layers * (moe.num_experts_per_tok - active) * 3 * model.config.hidden_size * moe.moe_intermediate_size
    assert cost_of(model.config).flops_per_token - cost_of(fewer.config).flops_per_token == 2 * spared


def test_a_number_of_active_experts_out_of_reach_is_refused(theirs: Get) -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok 7 is more than the 6"):
        load_checkpoint(theirs("mixtral").folder, active_experts=7)
    with pytest.raises(ConfigError, match="no experts"):
        load_checkpoint(theirs("llama").folder, active_experts=1)
