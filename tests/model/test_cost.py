"""Every count against the tensors of a real model, the cache that the engine allocates, and torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import TOYS, Theirs, prompt

from lineshaft.engine.cache import PagedCache, page_bytes
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, load_config
from lineshaft.model.config import LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder

Get = Callable[[str], Theirs]

V3 = ModelConfig(
    family="deepseek_v3",
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
    max_position_embeddings=4096,
    attention=LatentAttention(
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MixtureOfExperts(
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=3,
    ),
    vocab_size=129280,
)
"""DeepSeek-V3 as published."""


@pytest.mark.parametrize("name", TOYS)
def test_parameters_are_those_of_the_model(name: str, theirs: Get) -> None:
    model = load_checkpoint(theirs(name).folder)
    assert cost_of(model.config).parameters == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", TOYS)
def test_active_parameters_are_all_but_the_experts_not_chosen(name: str, theirs: Get) -> None:
    model = load_checkpoint(theirs(name).folder)
    config, moe = model.config, model.config.moe
    spared = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    if moe is not None:
        one = 3 * config.hidden_size * moe.moe_intermediate_size
        spared += len(model.routers()) * (moe.n_routed_experts - moe.num_experts_per_tok) * one
    assert cost_of(config).active_parameters == cost_of(config).parameters - spared


@pytest.mark.parametrize("name", TOYS)
def test_the_cache_holds_what_is_counted(name: str, theirs: Get) -> None:
    config = load_config(theirs(name).folder)
    cache = PagedCache(config, pages=3, page_tokens=5, dtype=torch.bfloat16)
    held = [part for parts in cache.parts for part in parts]
    assert sum(part.numel() for part in held) == 3 * 5 * cost_of(config).kv_numbers_per_token
    assert sum(part.nbytes for part in held) == 3 * page_bytes(config, 5, torch.bfloat16)


@pytest.mark.parametrize("name", TOYS)
def test_operations_are_those_that_torch_counts(name: str, theirs: Get) -> None:
    """All S x S scores of a row are computed, so each token meets S keys. torch counts only what it does by plain products."""
    model, tokens = load_checkpoint(theirs(name).folder), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.tensor(prompt(tokens)), torch.arange(tokens), PackedCausal([0], tokens))
    cost = cost_of(model.config)
    assert counter.get_total_flops() == tokens * (cost.flops_per_token + tokens * cost.attention_flops_per_token_and_key)


def test_a_model_can_be_counted_that_no_machine_here_could_hold() -> None:
    """DeepSeek-V3's own figures: 671 billion weights, 37 billion of them active (arXiv 2412.19437, section 1), without the MTP layer."""
    config = V3
    with torch.device("meta"):
        model = Decoder(config.model_copy(update={"num_hidden_layers": 4}))
    assert cost_of(model.config).parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert cost_of(config).parameters == pytest.approx(671e9, rel=0.001)
    assert cost_of(config).active_parameters == pytest.approx(37e9, rel=0.02)
    assert cost_of(config).kv_numbers_per_token == 61 * 576
