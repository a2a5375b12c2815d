"""Every count against the tensors of a real model, the cache that the engine allocates, and torch's own counter."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from shapes import SHAPES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import _SHAPE, TOYS

from lineshaft.engine.cache import PagedCache, groups_of, page_bytes
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import attention_flops, cost_of, kv_bytes, products, score_width
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.config import from_hf

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


def hollow(config: ModelConfig) -> Decoder:
    """A model whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("name", TOYS)
def test_parameters_on_the_parity_grid_are_those_of_transformers(name: str) -> None:
    family, options = TOYS[name]
    described = getattr(transformers, f"{family}Config")(**{**_SHAPE, **options})
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(described)
    buffers = [buffer for which, buffer in theirs.named_buffers() if which.endswith("e_score_correction_bias")]
    assert cost_of(from_hf(described.to_dict())).parameters == sum(item.numel() for item in [*theirs.parameters(), *buffers])


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_our_model(name: str) -> None:
    assert cost_of(SHAPES[name]).parameters == sum(tensor.numel() for tensor in hollow(SHAPES[name]).state_dict().values())


@pytest.mark.parametrize("name", SHAPES)
def test_products_that_can_be_recoded_are_the_models_linear_layers(name: str) -> None:
    config = SHAPES[name]
    counted = sorted(itertools.chain.from_iterable([(item.inputs, item.outputs)] * item.count for item in products(config) if item.linear))
    assert counted == sorted((linear.in_features, linear.out_features) for linear in hollow(config).linears().values())


@pytest.mark.parametrize("name", SHAPES)
def test_active_parameters_are_all_but_the_experts_not_chosen_and_the_layers_not_run(name: str) -> None:
    config, moe = SHAPES[name], SHAPES[name].moe
    model = hollow(config)
    spared = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    ahead = [layer.state_dict().values() for layer in model.model.layers[config.num_hidden_layers :]]
    spared += sum(tensor.numel() for tensors in ahead for tensor in tensors)
    if moe is not None:
        routers = len(model.routers()) - config.num_nextn_predict_layers
        spared += routers * (moe.n_routed_experts - moe.num_experts_per_tok) * 3 * config.hidden_size * moe.moe_intermediate_size
    assert cost_of(config).active_parameters == cost_of(config).parameters - spared


@pytest.mark.parametrize("name", SHAPES)
def test_the_cache_holds_what_is_counted(name: str) -> None:
    config = SHAPES[name]
    cache = PagedCache(config, pages=[3] * len(groups_of(config)), page_tokens=5, dtype=torch.bfloat16)
    held = [part for parts in cache.parts for part in parts]
    assert sum(part.numel() for part in held) == (3 + 1) * 5 * cost_of(config).kv_numbers_per_token
    assert sum(part.nbytes for part in held) == (3 + 1) * page_bytes(config, 5, torch.bfloat16)
    coded = PagedCache(config, pages=[3] * len(groups_of(config)), page_tokens=5, dtype=torch.int8)
    assert sum(part.nbytes for parts in coded.parts for part in parts) == (3 + 1) * page_bytes(config, 5, torch.int8)
    assert page_bytes(config, 5, torch.int8) < page_bytes(config, 5, torch.bfloat16)


def test_heads_of_64_channels_take_a_little_more_than_half_in_8_bits() -> None:
    config = SHAPES["llama"].model_copy(
        update={"attention": GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=2, head_dim=64), "num_hidden_layers": 3}
    )
    assert kv_bytes(config, "int8") == 2 * 2 * 66
    assert page_bytes(config, 16, torch.int8) / page_bytes(config, 16, torch.bfloat16) == 66 / 128


@pytest.mark.parametrize("name", [name for name, config in SHAPES.items() if "v32" not in name])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """Under a mask all S x S scores of a row are computed, so each token meets S keys; pairs that are seen are counted below.

    torch counts only plain products, and values that are filled up to the width of the keys at that width.
    """
    config, tokens = SHAPES[name], 24
    model = Decoder(config)
    model.initialise(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.arange(tokens), torch.arange(tokens), PackedCausal([0], tokens))
    a = config.attention
    filled = max(0, a.qk_nope_head_dim + a.qk_rope_head_dim - a.v_head_dim) * a.num_attention_heads if isinstance(a, LatentAttention) else 0
    a_pair = 2 * config.num_hidden_layers * (score_width(config) + filled)
    assert counter.get_total_flops() == tokens * cost_of(config).flops_per_token + tokens * tokens * a_pair


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_counted_by_the_pairs_that_see_each_other(name: str) -> None:
    config, tokens = SHAPES[name], 24
    a = config.attention
    indexer = a.indexer if isinstance(a, LatentAttention) else None
    total = 0
    for layer in range(config.num_hidden_layers):
        reach = config.reach_of(layer)
        for q in range(tokens):
            seen = sum(bool(reach.visible(q, k)) for k in range(tokens))
            total += 2 * score_width(config) * (seen if indexer is None else min(seen, indexer.top_k))
            total += 0 if indexer is None else 2 * indexer.num_heads * (indexer.head_dim + 1) * seen
    assert attention_flops(config, tokens) == total


def test_indexer_over_a_reach_of_its_own_is_counted_too() -> None:
    config = SHAPES["deepseek-v32"].model_copy(update={"reach": SHAPES["llama-blocks"].reach})
    reach, a = config.reach_of(0), config.attention
    assert isinstance(a, LatentAttention)
    assert a.indexer
    seen = [sum(bool(reach.visible(q, k)) for k in range(40)) for q in range(40)]
    pairs = sum(min(count, a.indexer.top_k) for count in seen) * score_width(config)
    scores = sum(seen) * a.indexer.num_heads * (a.indexer.head_dim + 1)
    assert attention_flops(config, 40) == 2 * config.num_hidden_layers * (pairs + scores)


def test_a_model_can_be_counted_that_no_machine_here_could_hold() -> None:
    """DeepSeek-V3's own figures: 671 billion weights, 37 billion of them active (arXiv 2412.19437, section 1), without the MTP layer."""
    assert cost_of(V3).parameters == pytest.approx(671e9, rel=0.001)
    assert cost_of(V3).active_parameters == pytest.approx(37e9, rel=0.02)
    assert cost_of(V3).kv_numbers_per_token == 61 * 576
