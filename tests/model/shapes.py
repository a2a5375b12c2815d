"""Descriptions of small models that differ in everything that costs something."""

from __future__ import annotations

from typing import Any

from lineshaft.model.config import ModelConfig

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40, "max_position_embeddings": 256, "vocab_size": 61}
_GQA = {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_MLA = {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8}
_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_SOFTMAX = {**_MOE, "scoring_func": "softmax", "n_shared_experts": 0, "first_k_dense_replace": 0}
_INDEXER = {"num_heads": 3, "head_dim": 8, "top_k": 7}


def _of(family: str, attention: dict[str, Any], **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"family": family, **_SIZES, "attention": attention, **more})


SHAPES: dict[str, ModelConfig] = {
    "llama": _of("llama", _GQA),
    "llama-biased": _of("llama", {**_GQA, "qkv_bias": True, "output_bias": True}, mlp_bias=True),
    "llama-tied": _of("llama", {**_GQA, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "mistral-window": _of("mistral", _GQA, reach=[{"kind": "window", "window": 7}]),
    "mistral-mixture": _of("mistral", _GQA, reach=[{"kind": "window", "window": 5, "global_tokens": 2}, {"kind": "causal"}]),
    "llama-blocks": _of("llama", _GQA, reach=[{"kind": "blocks", "block": 4, "stride": 3}]),
    "qwen2": _of("qwen2", {**_GQA, "qkv_bias": True}),
    "qwen3": _of("qwen3", {**_GQA, "qk_norm": True}),
    "mixtral": _of("mixtral", _GQA, moe=_SOFTMAX),
    "qwen2-moe": _of("qwen2_moe", {**_GQA, "qkv_bias": True}, moe={**_SOFTMAX, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": _of("qwen3_moe", {**_GQA, "qk_norm": True}, moe={**_SOFTMAX, "mlp_only_layers": [1]}),
    "deepseek-v2": _of("deepseek_v2", _MLA, moe={**_SOFTMAX, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": False}),
    "deepseek-v3": _of("deepseek_v3", {**_MLA, "q_lora_rank": 20}, moe={**_MOE, "n_group": 4, "topk_group": 2}),
    "deepseek-v3-wide-values": _of("deepseek_v3", {**_MLA, "v_head_dim": 16, "bias": True, "q_lora_rank": 20}, moe=_MOE),
    "deepseek-v3-added": _of("deepseek_v3", _MLA, moe={**_MOE, "n_added_experts": 2}),
    "deepseek-v3-mtp": _of("deepseek_v3", _MLA, moe=_MOE, num_nextn_predict_layers=2),
    "deepseek-v32": _of("deepseek_v32", {**_MLA, "q_lora_rank": 20, "indexer": _INDEXER}, moe=_MOE, num_nextn_predict_layers=1),
}
