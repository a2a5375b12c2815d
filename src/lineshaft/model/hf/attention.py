"""Attention of a config.json, both ways: heads, biases, latents, and which layers see how far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.model.config import GroupedQueryAttention, LatentAttention, ModelConfig
from lineshaft.ops.reach import Causal, Window

Hf = Mapping[str, Any]
_MLA_FIELDS = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_INDEXER = {"num_heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk"}
_WINDOW_ALWAYS = {"mistral": 4096, "mixtral": None}
"""Families with one window for all layers, and what an absent sliding_window means; nothing in the weights would tell."""
_WINDOW_IF_USED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_LAYER_TYPES = ("qwen2", "qwen2_moe", "qwen3")


def read_attention(hf: Hf) -> dict[str, Any]:
    """The `attention` table."""
    return _read_mla(hf) if hf["model_type"].startswith("deepseek") else _read_gqa(hf)


def _read_gqa(hf: Hf) -> dict[str, Any]:
    family, heads = hf["model_type"], hf["num_attention_heads"]
    width = hf.get("head_dim", 128 if family == "qwen3" else None)  # qwen3's own default
    biased = hf.get("attention_bias") or False if family in ("llama", "qwen3", "qwen3_moe") else False
    return {
        "kind": "gqa",
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": width or hf["hidden_size"] // heads,
        "qkv_bias": {"qwen2": True, "qwen2_moe": hf.get("qkv_bias", True)}.get(family, biased),
        "output_bias": biased,
        "qk_norm": family.startswith("qwen3"),
    }


def _read_mla(hf: Hf) -> dict[str, Any]:
    family, heads = hf["model_type"], hf["num_attention_heads"]
    if hf.get("num_key_value_heads") not in (None, heads):
        raise UnsupportedModel(f"{family}: fewer key heads than heads (num_key_value_heads) is not supported yet")
    table = {"kind": "mla", **{name: hf[name] for name in _MLA_FIELDS if name != "q_lora_rank"}, "q_lora_rank": hf.get("q_lora_rank")}
    table |= {"bias": hf.get("attention_bias") or False}
    if family == "deepseek_v3":
        table["rope_interleave"] = bool(hf.get("rope_interleave", True))  # null is no, to transformers
    if family == "deepseek_v32":
        table["indexer"] = {ours: hf[theirs] for ours, theirs in _INDEXER.items()}
    return table


def read_reach(hf: Hf) -> list[dict[str, Any]]:
    """The `reach` list, as short as it can be said."""
    family, layers = hf["model_type"], hf["num_hidden_layers"]
    if family not in _LAYER_TYPES and set(hf.get("layer_types") or ()) - {"full_attention", "indexed_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{family}: layers of different kinds (layer_types) are not supported yet")
    if family in _WINDOW_ALWAYS:
        if family == "mistral" and set(hf.get("layer_types") or ()) - {"sliding_attention"}:
            raise UnsupportedModel(f"{family}: a window in only some layers (layer_types), as Ministral has, is not supported yet")
        return [_window(hf.get("sliding_window", _WINDOW_ALWAYS[family]))]
    if family not in _WINDOW_IF_USED:
        if "sliding_attention" in (hf.get("layer_types") or ()):
            raise UnsupportedModel(f"{family}: a window in some layers (layer_types) is not supported yet")
        return [_window(None)]
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    if family == "qwen3_moe":
        return [_window(window)]
    return shortest_period([_window(window) if windowed else _window(None) for windowed in _windowed(hf, family, layers, window)])


def _windowed(hf: Hf, family: str, layers: int, window: int | None) -> list[bool]:
    """Which layers of a Qwen have the window."""
    if named := hf.get("layer_types"):
        if len(named) != layers or set(named) - {"full_attention", "sliding_attention"}:
            raise BadCheckpoint(f"config.json: layer_types must name {layers} layers, each full_attention or sliding_attention")
        if "sliding_attention" in named and window is None:
            raise BadCheckpoint("config.json: layer_types has sliding_attention, but use_sliding_window is not set")
        return [name == "sliding_attention" for name in named]
    bound = hf.get("max_window_layers", 28)
    if family == "qwen2_moe":
        return [window is not None and layer % 2 == 0 and layer < bound for layer in range(layers)]
    return [window is not None and layer >= bound for layer in range(layers)]


def _window(window: int | None) -> dict[str, Any]:
    return {"kind": "causal"} if window is None else {"kind": "window", "window": window}


def shortest_period(items: list[Any]) -> list[Any]:
    """The fewest first items that, repeated, give all of them."""
    return next(items[:size] for size in range(1, len(items) + 1) if all(item == items[i % size] for i, item in enumerate(items)))


def write_attention(config: ModelConfig) -> dict[str, Any]:
    """The keys of heads, biases and windows, as far as the family has words for them."""
    a = config.attention
    return (_gqa_to_hf(config, a) | _windows_to_hf(config)) if isinstance(a, GroupedQueryAttention) else _mla_to_hf(config, a)


def _gqa_to_hf(config: ModelConfig, a: GroupedQueryAttention) -> dict[str, Any]:
    hf: dict[str, Any] = {name: getattr(a, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    if config.family in ("llama", "qwen3", "qwen3_moe"):
        hf["attention_bias"] = a.qkv_bias
    if config.family == "qwen2_moe":
        hf["qkv_bias"] = a.qkv_bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    return hf


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    reaches = [config.reach_of(layer) for layer in range(config.num_hidden_layers)]
    windows = {reach.window for reach in reaches if isinstance(reach, Window)}
    window = windows.pop() if len(windows) == 1 else None  # several can't be said; to_hf notices
    if config.family in _WINDOW_ALWAYS:
        return {"sliding_window": window}
    if config.family not in _WINDOW_IF_USED:
        return {}
    full = [isinstance(reach, Causal) for reach in reaches]
    hf: dict[str, Any] = {"use_sliding_window": window is not None, "sliding_window": window}
    if config.family in _LAYER_TYPES:
        hf["layer_types"] = ["full_attention" if whole or window is None else "sliding_attention" for whole in full]
        # Readers older than layer_types know only a bound from which on layers have the window.
        hf["max_window_layers"] = full.index(False) if False in full else len(full)
    return hf


def _mla_to_hf(config: ModelConfig, a: LatentAttention) -> dict[str, Any]:
    hf = {name: getattr(a, name) for name in _MLA_FIELDS} | {"num_key_value_heads": a.num_attention_heads, "attention_bias": a.bias}
    if config.family == "deepseek_v3":
        hf["rope_interleave"] = a.rope_interleave
    if a.indexer is not None:
        hf |= {theirs: getattr(a.indexer, ours) for ours, theirs in _INDEXER.items()}
    return hf


def heads_load_elsewhere(config: ModelConfig) -> bool:
    """Does transformers take this number of heads? For two families it wants one that divides hidden_size, whatever the heads' width."""
    return config.family not in ("llama", "deepseek_v2") or config.hidden_size % config.attention.num_attention_heads == 0
