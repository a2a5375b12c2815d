"""What a GGUF file says of a model, number by number; that llama.cpp makes the right thing of it is tested where it is installed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import toys
import transformers
from toys import TOYS

from lineshaft.compress.export.gguf_metadata import metadata
from lineshaft.model.hf.config import from_hf

COMMON = {"context_length": 128, "embedding_length": 32, "feed_forward_length": 40, "vocab_size": 61}
GQA = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6}
MLA = {
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 12 + 6,
    "attention.value_length": 12,
    "attention.key_length_mla": 10 + 6,
    "attention.value_length_mla": 8,
    "attention.q_lora_rank": 20,
    "attention.kv_lora_rank": 12,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "block_count": 3,
    "rope.dimension_count": 6,
    "rope.freq_base": 10000.0,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 16,
    "expert_shared_count": 1,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
}


def heads(width: int, theta: float = 10000.0, layers: int = 2) -> dict[str, Any]:
    lengths = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), width)
    return {**COMMON, **GQA, **lengths, "rope.freq_base": theta, "block_count": layers}


YARN_4 = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
YARN_40 = {"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 32}
WANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", heads(8)),
    "llama-wide-heads": ("llama", heads(14)),
    "llama-llama3": ("llama", heads(16, 100.0)),
    "llama-linear": ("llama", heads(8) | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-yarn": ("llama", heads(16, 100.0) | YARN_4),
    "qwen2": ("qwen2", heads(8)),
    "qwen3": ("qwen3", heads(8)),
    "mixtral": ("llama", heads(8, 1000000.0) | {"expert_count": 6, "expert_used_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}),
    "qwen3_moe": ("qwen3moe", heads(8, layers=3) | {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 16}),
    "deepseek": ("deepseek2", COMMON | MLA),
    "deepseek-direct-query": ("deepseek2", COMMON | MLA | {"attention.q_lora_rank": 0}),
    "deepseek-groups": ("deepseek2", COMMON | MLA | {"expert_group_count": 4, "expert_group_used_count": 2}),
    "deepseek_v2": (
        "deepseek2",
        COMMON | MLA | {"expert_shared_count": 2, "expert_gating_func": 1, "expert_weights_norm": False},
    ),
    "deepseek_v2-yarn": (
        "deepseek2",
        COMMON
        | MLA
        | {"expert_shared_count": 2, "expert_gating_func": 1, "expert_weights_norm": False}
        | {"attention.key_length": 12 + 16, "attention.key_length_mla": 10 + 16, "rope.dimension_count": 16, "rope.freq_base": 100.0}
        | {"context_length": 1280, "rope.scaling.yarn_log_multiplier": 0.1 * 0.707}
        | YARN_40,
    ),
}


def config_of(name: str) -> Any:
    family, options = TOYS[name]
    return from_hf(getattr(transformers, f"{family}Config")(**{**toys._SHAPE, **options}).to_dict())


@pytest.mark.parametrize("name", WANTED)
def test_the_file_says_what_the_config_does(name: str) -> None:
    arch, wanted = WANTED[name]
    assert metadata(config_of(name)) == {f"{arch}.{key}": value for key, value in wanted.items()}


@pytest.mark.parametrize("name", ["llama-yarn-factor-of-its-own", "llama-yarn-two-mscales"])
def test_another_length_of_turned_vectors_is_told_as_a_part_of_the_usual(name: str) -> None:
    config = config_of(name)
    usual = 0.1 * math.log(config.rope_scaling.factor) + 1
    assert metadata(config)["llama.rope.scaling.attn_factor"] * usual == pytest.approx(config.rope_scaling.length)
