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
    try:
        _refuse_unsupported(hf, str(family))
        table = {"family": family, **_common(hf), "attention": _ATTENTION[str(family)](hf), "moe": _moe(hf)}
    except KeyError as error:
        raise BadCheckpoint(f"config.json: {error} is missing for a {family} model") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise BadCheckpoint(f"config.json: a value has the wrong type: {error}") from None
    try:
        return load(ModelConfig, table, where="config.json")
    except ConfigError as error:
        raise BadCheckpoint(str(error)) from None


def _refuse_unsupported(hf: Hf, family: str) -> None:
    rope = _rope(hf)
    rope_types = [table.get("rope_type", table.get("type", "default")) for table in _ropes(hf)]
    rope_type = next((name for name in rope_types if name != "default"), "default")
    layer_types = set(hf.get("layer_types") or ()) - {"full_attention"}
    refused = {
        f'rope scaling "{rope_type}"': rope_type != "default",
        "rotary positions that differ between layers (rope_parameters)": any(isinstance(part, dict) for part in rope.values()),
        "rotating only a part of each head (partial_rotary_factor)": _either(rope, hf, "partial_rotary_factor", 1) != 1,
        f'hidden_act "{hf.get("hidden_act")}"': hf.get("hidden_act", "silu") != "silu",
        "a window in only some layers (use_sliding_window, layer_types)": bool(hf.get("use_sliding_window") or layer_types),
    }
    if family == "deepseek_v3":
        refused |= {
            f'router scoring "{hf.get("scoring_func")}" (scoring_func)': hf.get("scoring_func", "sigmoid") != "sigmoid",
            f'router choice "{hf.get("topk_method")}" (topk_method)': hf.get("topk_method", "noaux_tc") != "noaux_tc",
            "half-split rotary positions (rope_interleave: false)": hf.get("rope_interleave", True) is not True,
            "experts in only some layers (moe_layer_freq)": hf.get("moe_layer_freq", 1) != 1,
            "a model without experts (n_routed_experts)": not hf.get("n_routed_experts"),
            "fewer key heads than heads (num_key_value_heads)": _either(hf, hf, "num_key_value_heads", None)
            not in (None, hf["num_attention_heads"]),
        }
    for what, present in refused.items():
        if present:
            raise UnsupportedModel(f"{family}: {what} is not supported yet")


def _ropes(hf: Hf) -> tuple[Hf, Hf]:
    """transformers 4 writes rope_scaling, transformers 5 rope_parameters; where a file has both, the first wins."""
    return hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}


def _rope(hf: Hf) -> dict[str, Any]:
    scaling, parameters = _ropes(hf)
    return {**parameters, **scaling}


def _either(first: Hf, second: Hf, name: str, default: Any) -> Any:
    """The value of `name` in one of two tables; null counts as absent."""
    value = first.get(name, second.get(name))
    return default if value is None else value


def _common(hf: Hf) -> dict[str, Any]:
    eos = hf.get("eos_token_id")
    return {
        **{name: hf[name] for name in _SAME_NAME},
        "rope_theta": _either(_rope(hf), hf, "rope_theta", 10000.0),
        "mlp_bias": _flag(hf, "mlp_bias") if hf["model_type"] == "llama" else False,
        "tie_word_embeddings": _flag(hf, "tie_word_embeddings"),
        "initializer_range": hf.get("initializer_range", 0.02),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
    }


def _flag(hf: Hf, name: str) -> Any:
    return hf.get(name) or False


def _gqa(hf: Hf, **family: Any) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    table = {
        "kind": "gqa",
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
    }
    return table | family


def _mla(hf: Hf) -> dict[str, Any]:
    names = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {"kind": "mla", **{name: hf[name] for name in names}, "q_lora_rank": hf.get("q_lora_rank"), "bias": _flag(hf, "attention_bias")}


def _same_biases(hf: Hf) -> dict[str, Any]:
    return {"qkv_bias": _flag(hf, "attention_bias"), "output_bias": _flag(hf, "attention_bias")}


# An absent sliding_window means 4096 to transformers, and nothing in the weights would tell; null means none.
_ATTENTION: Mapping[str, Callable[[Hf], dict[str, Any]]] = {
    "deepseek_v3": _mla,
    "llama": lambda hf: _gqa(hf, **_same_biases(hf)),
    "mistral": lambda hf: _gqa(hf, sliding_window=hf.get("sliding_window", 4096)),
    "qwen2": lambda hf: _gqa(hf, qkv_bias=True),
    "qwen3": lambda hf: _gqa(hf, qk_norm=True, **_same_biases(hf)),
}

_MOE_FIELDS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "first_k_dense_replace",
)


def _moe(hf: Hf) -> dict[str, Any] | None:
    if hf["model_type"] != "deepseek_v3":
        return None
    return {name: hf[name] for name in _MOE_FIELDS} | {"n_shared_experts": hf["n_shared_experts"] or 0}


_SAME_NAME = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "rms_norm_eps")


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose dense weights are stored as `dtype` (such as "float32")."""
    a, eos = config.attention, config.eos_token_ids
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{name: getattr(config, name) for name in (*_SAME_NAME, "tie_word_embeddings", "initializer_range", "bos_token_id")},
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **(_gqa_to_hf(config, a) if isinstance(a, GroupedQueryAttention) else _mla_to_hf(config, a)),
    }
    assert from_hf(hf) == config, "ModelConfig refuses what its family's config.json can't express"
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
    assert config.moe is not None  # ModelConfig sees to it
    names = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        **{name: getattr(a, name) for name in names},
        **{name: getattr(config.moe, name) for name in (*_MOE_FIELDS, "n_shared_experts")},
        "num_key_value_heads": a.num_attention_heads,
        "attention_bias": a.bias,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
