"""Between our model description and Hugging Face's config.json, for every family that we run.

What we can't run exactly is refused by name; nothing is approximated in silence. What we can run but the family's
config.json has no words for (see DIALECT) is written so that no other tool takes it for something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.model.config import Family, ModelConfig
from lineshaft.model.hf.attention import read_attention, read_reach, write_attention
from lineshaft.model.hf.experts import read_moe, write_moe
from lineshaft.model.hf.rope import read_rope, write_rope

Hf = Mapping[str, Any]

ARCHITECTURES: Mapping[Family, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

DIALECT = "lineshaft"
"""model_type of a model that its family's config.json can't describe, such as a window with global tokens.

The description then lies under this key. Another tool refuses the unknown model_type instead of running another model.
"""

_SAME_NAME = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "rms_norm_eps")


def from_hf(hf: Hf) -> ModelConfig:
    """Our description of a config.json. Raises UnsupportedModel naming what we lack, BadCheckpoint for a broken file."""
    family = hf.get("model_type")
    if family == DIALECT:
        return _from_dialect(hf)
    if family not in get_args(Family):
        raise UnsupportedModel(f'model_type "{family}" is not supported; supported: {", ".join(get_args(Family))}')
    try:
        table = {"family": family, **_common(hf), "attention": read_attention(hf), "reach": read_reach(hf), "moe": read_moe(hf)}
    except KeyError as error:
        raise BadCheckpoint(f"config.json: {error} is missing for a {family} model") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise BadCheckpoint(f"config.json: a value has the wrong type: {error}") from None
    return _loaded(table)


def _from_dialect(hf: Hf) -> ModelConfig:
    table = hf.get(DIALECT)
    if not isinstance(table, dict):
        raise BadCheckpoint(f'config.json: model_type "{DIALECT}" needs the description of the model under "{DIALECT}"')
    return _loaded(table | {"eos_token_ids": _end_tokens(hf.get("eos_token_id"))})


def _loaded(table: Mapping[str, Any]) -> ModelConfig:
    try:
        return load(ModelConfig, table, where="config.json")
    except ConfigError as error:
        raise BadCheckpoint(str(error)) from None


def _common(hf: Hf) -> dict[str, Any]:
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModel(f'{hf["model_type"]}: hidden_act "{activation}" is not supported yet')
    predicts = hf["model_type"] in ("deepseek_v3", "deepseek_v32")
    return {
        **{name: hf[name] for name in _SAME_NAME},
        **read_rope(hf),
        "mlp_bias": hf.get("mlp_bias") or False if hf["model_type"] == "llama" else False,
        "tie_word_embeddings": hf.get("tie_word_embeddings") or False,
        "initializer_range": hf.get("initializer_range", 0.02),
        "num_nextn_predict_layers": hf.get("num_nextn_predict_layers") or 0 if predicts else 0,
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": _end_tokens(hf.get("eos_token_id")),
    }


def _end_tokens(eos: Any) -> list[Any]:
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose dense weights are stored as `dtype` (such as "float32")."""
    eos = config.eos_token_ids
    shared: dict[str, Any] = {
        **{name: getattr(config, name) for name in (*_SAME_NAME, "tie_word_embeddings", "initializer_range", "bos_token_id")},
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    native = shared | {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **write_rope(config),
        **write_attention(config),
        **write_moe(config),
    }
    if _says(native, config):
        return native
    return shared | {"architectures": ["LineshaftForCausalLM"], "model_type": DIALECT, DIALECT: config.model_dump(mode="json")}


def is_native(config: ModelConfig) -> bool:
    """Can the family's own config.json describe this model, so that other tools run it?"""
    return DIALECT not in to_hf(config, "float32")


def _says(hf: Hf, config: ModelConfig) -> bool:
    """Does this config.json describe this model and no other?"""
    try:
        return meaning(from_hf(hf)) == meaning(config)
    except (BadCheckpoint, UnsupportedModel):
        return False


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The description with everything said layer by layer: equal for two that mean the same model."""
    layers, table = range(config.num_hidden_layers), config.model_dump()
    table["reach"] = [config.reach_of(layer).model_dump() for layer in range(config.all_layers)]
    if config.moe is not None:
        dense = [layer for layer in layers if not config.is_moe_layer(layer)]
        table["moe"] = config.moe.model_dump(exclude={"first_k_dense_replace", "mlp_only_layers"}) | {"dense": dense}
    return table
