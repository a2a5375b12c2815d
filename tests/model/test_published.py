"""The config.json of well-known checkpoints, as published: read, counted, and written again as the same model.

No weights are at hand here; the counts are those that the models are named by or that their authors state.
"""

from __future__ import annotations

from typing import Any

import pytest

from lineshaft.model.config import LatentAttention
from lineshaft.model.cost import cost_of
from lineshaft.model.hf.config import from_hf, is_native, meaning, to_hf
from lineshaft.model.positions import Llama3, Yarn

_YARN_40 = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN_40 | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_DEEPSEEK_V2_LITE: dict[str, Any] = _DEEPSEEK_V3 | {
    "model_type": "deepseek_v2",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": _YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
del _DEEPSEEK_V2_LITE["num_nextn_predict_layers"]
_LLAMA_31_8B: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN15_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN25_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

PUBLISHED: dict[str, tuple[dict[str, Any], float, float, int]] = {
    # config.json, billions of parameters without prediction layers, billions active, numbers in the cache for a token
    "DeepSeek-V3": (_DEEPSEEK_V3, 671.0, 37.5, 61 * 576),
    "DeepSeek-V2-Lite": (_DEEPSEEK_V2_LITE, 15.7, 2.7, 27 * 576),
    "Llama-3.1-8B": (_LLAMA_31_8B, 8.03, 8.03, 32 * 2048),
    "Mixtral-8x7B": (_MIXTRAL, 46.7, 12.9, 32 * 2048),
    "Qwen3-30B-A3B": (_QWEN3_30B_A3B, 30.5, 3.35, 48 * 1024),
    "Qwen1.5-MoE-A2.7B": (_QWEN15_MOE, 14.3, 2.7, 24 * 4096),
    "Qwen2.5-0.5B": (_QWEN25_05B, 0.494, 0.494, 24 * 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_counted_as_its_authors_count_it(name: str) -> None:
    hf, total, active, cached = PUBLISHED[name]
    cost = cost_of(from_hf(hf | {"num_nextn_predict_layers": 0}))
    assert cost.parameters / 1e9 == pytest.approx(total, rel=4e-3)
    table = 0 if hf["tie_word_embeddings"] else (hf["vocab_size"] - 1) * hf["hidden_size"]  # a token uses one row, authors count all
    assert (cost.active_parameters + table) / 1e9 == pytest.approx(active, rel=0.015)
    assert cost.kv_numbers_per_token == cached


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_written_as_the_same_model(name: str) -> None:
    config = from_hf(PUBLISHED[name][0])
    assert is_native(config)
    assert meaning(from_hf(to_hf(config, "bfloat16"))) == meaning(config)


@pytest.mark.parametrize(
    ("name", "key", "active", "saved"),
    [("Mixtral-8x7B", "num_experts_per_tok", 1, 0.44), ("DeepSeek-V2-Lite", "num_experts_per_tok", 1, 0.45)],
)
def test_fewer_active_experts_save_operations(name: str, key: str, active: int, saved: float) -> None:
    """1 of Mixtral's 8 experts instead of 2, and 1 of DeepSeek-V2-Lite's 64 instead of 6, beside its 2 shared ones."""
    whole, fewer = (cost_of(from_hf(PUBLISHED[name][0] | change)).flops_per_token for change in ({}, {key: active}))
    assert 1 - fewer / whole == pytest.approx(saved, abs=0.01)


def test_prediction_layers_are_read_and_counted() -> None:
    """685 billion parameters are what the files of DeepSeek-V3 hold: its prediction layer with copies of table and head."""
    config = from_hf(_DEEPSEEK_V3)
    assert config.num_nextn_predict_layers == 1
    copies = 2 * config.vocab_size * config.hidden_size
    assert (cost_of(config).parameters + copies) / 1e9 == pytest.approx(684.5, rel=2e-3)


def test_positions_are_those_of_the_papers() -> None:
    deepseek, lite, llama = (from_hf(PUBLISHED[name][0]).rope_scaling for name in ("DeepSeek-V3", "DeepSeek-V2-Lite", "Llama-3.1-8B"))
    assert isinstance(deepseek, Yarn)
    assert isinstance(lite, Yarn)
    assert isinstance(llama, Llama3)
    assert deepseek.length == 1.0
    assert deepseek.score_scale == pytest.approx((0.1 * 3.6888794541 + 1) ** 2)  # ln 40
    assert lite.score_scale == pytest.approx((0.0707 * 3.6888794541 + 1) ** 2)
    assert llama.original_max_position_embeddings == 8192


def test_the_indexer_of_v32_is_read() -> None:
    hf = _DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    config = from_hf(hf)
    assert isinstance(config.attention, LatentAttention)
    assert config.attention.indexer is not None
    assert config.attention.indexer.top_k == 2048
    assert config.num_nextn_predict_layers == 1
    assert is_native(config)
