"""Between our model description and Hugging Face's config.json, for every family that we run.

What we can't run exactly is refused by name; nothing is approximated in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.model.config import Family, GroupedQueryAttention, LatentAttention, ModelConfig

Hf = Mapping[str, Any]

ARCHITECTURES: Mapping[Family, str] = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def from_hf(hf: Hf) -> ModelConfig:
    """Our description of a config.json. Raises UnsupportedModel naming what we lack, BadCheckpoint for a broken file."""
    family = hf.get("model_type")
    if family not in get_args(Family):
        raise UnsupportedModel(f'model_type "{family}" is not supported; supported: {", ".join(get_args(Family))}')
    _refuse_unsupported(hf)
    try:
        table = {"family": family, **_common(hf), "attention": _ATTENTION[family](hf), "moe": _moe(hf) if family == "deepseek_v3" else None}
    except KeyError as error:
        raise BadCheckpoint(f"config.json: {error} is missing for a {family} model") from None
    try:
        return load(ModelConfig, table, where="config.json")
    except ConfigError as error:
        raise BadCheckpoint(str(error)) from None


def _refuse_unsupported(hf: Hf) -> None:
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f'rope scaling "{rope_type}"': rope_type != "default",
        f'hidden_act "{hf.get("hidden_act")}"': hf.get("hidden_act", "silu") != "silu",
        "sliding windows that differ between layers (use_sliding_window)": bool(hf.get("use_sliding_window")),
        f'router scoring "{hf.get("scoring_func")}"': hf.get("scoring_func", "sigmoid") != "sigmoid",
        "half-split rotary positions in deepseek_v3 (rope_interleave: false)": hf.get("rope_interleave") is False,
        "experts in only some layers (moe_layer_freq)": hf.get("moe_layer_freq", 1) != 1,
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedModel(f"{hf.get('model_type')}: {what} is not supported yet")


def _common(hf: Hf) -> dict[str, Any]:
    eos = hf.get("eos_token_id")
    theta = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta", 10000.0))
    return {
        **{name: hf[name] for name in _SAME_NAME},
        "rope_theta": float(theta),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "initializer_range": float(hf.get("initializer_range", 0.02)),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
    }


def _gqa(hf: Hf, **family: Any) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    table = {
        "kind": "gqa",
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
    }
    return table | family


def _bias(hf: Hf) -> bool:
    return bool(hf.get("attention_bias", False))


def _mla(hf: Hf) -> dict[str, Any]:
    names = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {"kind": "mla", **{name: hf[name] for name in names}, "q_lora_rank": hf.get("q_lora_rank"), "bias": _bias(hf)}


_ATTENTION: Mapping[str, Callable[[Hf], dict[str, Any]]] = {
    "deepseek_v3": _mla,
    "llama": lambda hf: _gqa(hf, qkv_bias=_bias(hf), output_bias=_bias(hf)),
    "mistral": lambda hf: _gqa(hf, sliding_window=hf.get("sliding_window")),
    "qwen2": lambda hf: _gqa(hf, qkv_bias=True),
    "qwen3": lambda hf: _gqa(hf, qkv_bias=_bias(hf), output_bias=_bias(hf), qk_norm=True),
}

_MOE_FIELDS = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "n_group", "topk_group", "norm_topk_prob")


def _moe(hf: Hf) -> dict[str, Any] | None:
    if not hf.get("n_routed_experts"):
        raise UnsupportedModel("deepseek_v3 without experts (n_routed_experts) is not supported")
    table = {name: hf[name] for name in _MOE_FIELDS}
    return table | {
        "routed_scaling_factor": float(hf["routed_scaling_factor"]),
        "first_k_dense_replace": min(hf["first_k_dense_replace"], hf["num_hidden_layers"]),
    }


_SAME_NAME = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "rms_norm_eps")


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose dense weights are stored as `dtype` (such as "float32").

    Raises ConfigError when the family's config.json can't express the model (a bias that the family does not have, say).
    """
    a, eos = config.attention, config.eos_token_ids
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{name: getattr(config, name) for name in (*_SAME_NAME, "tie_word_embeddings", "initializer_range", "bos_token_id")},
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **(_gqa_to_hf(config, a) if isinstance(a, GroupedQueryAttention) else _mla_to_hf(config, a)),
    }
    if from_hf(hf) != config:
        raise ConfigError(f"a {config.family} checkpoint can't express this model: its biases, windows or norms differ from the family's")
    return hf


def _gqa_to_hf(config: ModelConfig, a: GroupedQueryAttention) -> dict[str, Any]:
    hf: dict[str, Any] = {name: getattr(a, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    family: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": a.qkv_bias, "mlp_bias": config.mlp_bias},
        "mistral": {"sliding_window": a.sliding_window},
        "qwen3": {"attention_bias": a.qkv_bias},
    }
    return hf | family.get(config.family, {})


def _mla_to_hf(config: ModelConfig, a: LatentAttention) -> dict[str, Any]:
    if config.moe is None:
        raise ConfigError("a deepseek_v3 checkpoint needs experts: set moe")
    names = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        **{name: getattr(a, name) for name in names},
        **{name: getattr(config.moe, name) for name in (*_MOE_FIELDS, "routed_scaling_factor", "first_k_dense_replace")},
        "num_key_value_heads": a.num_attention_heads,
        "attention_bias": a.bias,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
