"""What a GGUF file says of a model beside its tensors, and which models it can't describe.

Keys are those that llama.cpp reads, found in its sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lineshaft.base.errors import UnsupportedModel
from lineshaft.model.config import Family, GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.mla import LATENT_NORM_EPS
from lineshaft.model.positions import Dynamic, Linear, Llama3, Yarn
from lineshaft.ops.reach import Causal

Value = bool | int | float | str | list[str] | list[int]
"""A float is written as float32, an int as uint32 and a list of ints as int32."""

ARCHITECTURES: Mapping[Family, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
_MISREAD_LAYERS = (26, 27)
"""By these numbers of layers llama.cpp knows DeepSeek-V2-Lite, and leaves q_lora_rank unread."""
_GATING = {"softmax": 1, "sigmoid": 2}


def metadata(config: ModelConfig) -> dict[str, Value]:
    """What the file says of the model. Raises UnsupportedModel, naming what llama.cpp could not run as we do."""
    refuse(config)
    arch, a = ARCHITECTURES[config.family], config.attention
    said: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": a.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
    }
    said |= _heads(a) | _scaling(config)
    if config.moe is not None:
        said |= _experts(config, config.moe)
    return {f"{arch}.{name}": value for name, value in said.items()}


def _heads(a: GroupedQueryAttention | LatentAttention) -> dict[str, Value]:
    if isinstance(a, GroupedQueryAttention):
        return {"attention.head_count_kv": a.num_key_value_heads, "attention.key_length": a.head_dim, "attention.value_length": a.head_dim}
    return {
        "attention.head_count_kv": 1,  # keys and values are absorbed into the queries: one latent head for all
        "attention.key_length": a.kv_lora_rank + a.qk_rope_head_dim,
        "attention.value_length": a.kv_lora_rank,
        "attention.key_length_mla": a.qk_nope_head_dim + a.qk_rope_head_dim,
        "attention.value_length_mla": a.v_head_dim,
        "attention.q_lora_rank": a.q_lora_rank or 0,
        "attention.kv_lora_rank": a.kv_lora_rank,
    }


def _experts(config: ModelConfig, moe: MixtureOfExperts) -> dict[str, Value]:
    said: dict[str, Value] = {"expert_count": moe.n_routed_experts, "expert_used_count": moe.num_experts_per_tok}
    if config.family == "mixtral":
        return said
    said["expert_feed_forward_length"] = moe.moe_intermediate_size
    if config.family == "qwen3_moe":
        return said
    said |= {
        "leading_dense_block_count": moe.first_k_dense_replace,
        "expert_shared_count": moe.n_shared_experts,
        "expert_weights_scale": moe.routed_scaling_factor,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": _GATING[moe.scoring_func],
    }
    if moe.n_group != moe.topk_group:  # llama.cpp refuses to be told that every group may be chosen
        said |= {"expert_group_count": moe.n_group, "expert_group_used_count": moe.topk_group}
    return said


def _scaling(config: ModelConfig) -> dict[str, Value]:
    """Positions beyond the trained context. Llama 3.1's are a tensor (`gguf_names.ROPE_FACTORS`)."""
    match config.rope_scaling:
        case Linear(factor=factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        case Yarn():
            return _yarn(config, config.rope_scaling)
    return {}


def _yarn(config: ModelConfig, yarn: Yarn) -> dict[str, Value]:
    said: dict[str, Value] = {"rope.scaling.type": "yarn", "rope.scaling.factor": yarn.factor}
    said["rope.scaling.original_context_length"] = yarn.original_max_position_embeddings
    if isinstance(config.attention, LatentAttention) and yarn.mscale_all_dim:
        return said | {"rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim}  # it divides by 0.1
    # llama.cpp's own length of the turned vectors, times this, is ours.
    usual = 1.0 if yarn.factor <= 1 else 0.1 * math.log(yarn.factor) + 1.0
    return said if yarn.length == usual else said | {"rope.scaling.attn_factor": yarn.length / usual}


def refuse(config: ModelConfig) -> None:
    """Raises UnsupportedModel, naming the first thing of this model that llama.cpp can't be told, or reads in another way."""
    if config.family not in ARCHITECTURES:
        raise UnsupportedModel(f"export: {config.family} can't be exported to GGUF; can be: {', '.join(ARCHITECTURES)}")
    for what, present in (_of_all(config) | _of_attention(config) | _of_experts(config)).items():
        if present:
            raise UnsupportedModel(f"export: {config.family}: {what}: llama.cpp can't be told, and would give other answers")


def _of_all(config: ModelConfig) -> dict[str, bool]:
    scaling, deepseek = config.rope_scaling, isinstance(config.attention, LatentAttention)
    reaches = [config.reach_of(layer) for layer in range(config.num_hidden_layers)]
    tokens = config.max_position_embeddings
    yarn = scaling if isinstance(scaling, Yarn) else None
    return {
        "layers that do not see the whole text (a window)": any(
            not isinstance(reach, Causal) and reach.pairs(tokens) != tokens * (tokens + 1) // 2 for reach in reaches
        ),
        "rope scaling dynamic": isinstance(scaling, Dynamic),
        "rope scaling llama3": isinstance(scaling, Llama3) and ARCHITECTURES[config.family] != "llama",
        "rope scaling linear": isinstance(scaling, Linear) and deepseek,
        "yarn with bounds other than 32 and 1, rounded (beta_fast, beta_slow, truncate)": yarn is not None
        and (yarn.beta_fast, yarn.beta_slow, yarn.truncate) != (32.0, 1.0, True),
        "yarn that makes turned vectors longer (mscale is not mscale_all_dim)": yarn is not None and deepseek and yarn.length != 1,
    }


def _of_attention(config: ModelConfig) -> dict[str, bool]:
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        narrow = a.num_attention_heads * a.head_dim == config.hidden_size
        return {
            "heads that do not make up hidden_size (head_dim)": config.family == "qwen2" and not narrow,
            "biases in attention (attention_bias)": config.family in ("qwen3", "qwen3_moe") and a.qkv_bias,
        }
    lite = config.num_hidden_layers in _MISREAD_LAYERS and a.q_lora_rank is not None
    return {
        "biases in attention (attention_bias)": a.bias,
        f"an rms_norm_eps other than the {LATENT_NORM_EPS:g} of the norms of latents": config.rms_norm_eps != LATENT_NORM_EPS,
        f"compressed queries in a model of {config.num_hidden_layers} layers": lite,
    }


def _of_experts(config: ModelConfig) -> dict[str, bool]:
    moe = config.moe
    if moe is None:
        return {}
    v2_groups = config.family == "deepseek_v2" and moe.n_group != moe.topk_group
    deepseek = isinstance(config.attention, LatentAttention)
    leading = moe.first_k_dense_replace if deepseek else 0
    scattered = any(config.is_moe_layer(layer) != (layer >= leading) for layer in range(config.num_hidden_layers))
    return {
        "dense layers other than the first ones": scattered,
        "router weights that are not normalised (norm_topk_prob)": not deepseek and not moe.norm_topk_prob,
        "experts of another width than intermediate_size": config.family == "mixtral"
        and moe.moe_intermediate_size != config.intermediate_size,
        "no shared expert (n_shared_experts)": deepseek and not moe.n_shared_experts,
        "experts in groups, judged by their best one (group_limited_greedy)": v2_groups,
        "experts that were added": bool(moe.n_added_experts),
        "a scaling of router weights (routed_scaling_factor)": not deepseek and moe.routed_scaling_factor != 1,
    }
