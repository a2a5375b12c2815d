"""Experts of a config.json, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lineshaft.base.errors import UnsupportedModel
from lineshaft.model.config import MixtureOfExperts, ModelConfig

Hf = Mapping[str, Any]
_DEEPSEEK = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor")
_QWEN = ("num_experts_per_tok", "moe_intermediate_size")
_ROUTERS = {"deepseek_v2": ("softmax", ("greedy", "group_limited_greedy"))}
_SIGMOID_ROUTER = ("sigmoid", ("noaux_tc",))


def read_moe(hf: Hf) -> dict[str, Any] | None:
    """The `moe` table, or None for a family without experts."""
    family = hf["model_type"]
    if family.startswith("deepseek"):
        return _read_deepseek(hf, family)
    if family == "mixtral":
        return {
            "n_routed_experts": hf["num_local_experts"],
            "num_experts_per_tok": hf["num_experts_per_tok"],
            "moe_intermediate_size": hf["intermediate_size"],
            "scoring_func": "softmax",
            "n_shared_experts": 0,
        }
    return _read_qwen(hf, family) if family.endswith("_moe") else None


def _read_deepseek(hf: Hf, family: str) -> dict[str, Any]:
    _refuse_other_deepseeks(hf, family)
    groups = {"n_group": hf["n_group"], "topk_group": hf["topk_group"]} if family != "deepseek_v2" else _v2_groups(hf)
    first, further = _dense_layers(hf)
    return {
        **{name: hf[name] for name in _DEEPSEEK},
        **groups,
        "n_shared_experts": hf["n_shared_experts"] or 0,
        "norm_topk_prob": False if family == "deepseek_v2" else hf["norm_topk_prob"],
        "scoring_func": _ROUTERS.get(family, _SIGMOID_ROUTER)[0],
        "first_k_dense_replace": first,
        "mlp_only_layers": further,
    }


def _refuse_other_deepseeks(hf: Hf, family: str) -> None:
    scoring, methods = _ROUTERS.get(family, _SIGMOID_ROUTER)
    refused = {
        "a model without experts (n_routed_experts)": not hf.get("n_routed_experts"),
        f'router scoring "{hf.get("scoring_func")}" (scoring_func)': (hf.get("scoring_func") or scoring) != scoring,
        f'router choice "{hf.get("topk_method")}" (topk_method)': (hf.get("topk_method") or methods[0]) not in methods,
        "experts in only some layers (moe_layer_freq)": (hf.get("moe_layer_freq") or 1) != 1,
        "normalised router weights (norm_topk_prob)": family == "deepseek_v2" and bool(hf.get("norm_topk_prob")),
        "biases in feed-forward blocks (mlp_bias)": bool(hf.get("mlp_bias")),
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedModel(f"{family}: {what} is not supported yet")


def _v2_groups(hf: Hf) -> dict[str, Any]:
    if (hf.get("topk_method") or "greedy") == "greedy":
        return {}
    return {"n_group": hf["n_group"], "topk_group": hf["topk_group"]}


def _dense_layers(hf: Hf) -> tuple[int, list[int]]:
    """How many first layers are dense, and which others. deepseek_v32 may list all layers by mlp_layer_types."""
    kinds = hf.get("mlp_layer_types")
    if hf["model_type"] != "deepseek_v32" or kinds is None:
        return hf["first_k_dense_replace"], []
    first = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return first, [layer for layer, kind in enumerate(kinds) if layer > first and kind == "dense"]


def _read_qwen(hf: Hf, family: str) -> dict[str, Any]:
    every, named = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
    return {
        **{name: hf[name] for name in _QWEN},
        "n_routed_experts": hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"],  # transformers 5, and 4
        "scoring_func": "softmax",
        "n_shared_experts": 0,
        "shared_expert_intermediate_size": hf["shared_expert_intermediate_size"] if family == "qwen2_moe" else 0,
        "norm_topk_prob": hf.get("norm_topk_prob") or False,
        "mlp_only_layers": [layer for layer in range(hf["num_hidden_layers"]) if layer in named or (layer + 1) % every],
    }


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The keys of the family's experts, as far as it has words for them."""
    moe = config.moe
    if moe is None:
        return {}
    if config.family.startswith("deepseek"):
        return _deepseek_to_hf(config, moe)
    if config.family == "mixtral":
        return {"num_local_experts": moe.n_routed_experts, "num_experts_per_tok": moe.num_experts_per_tok}
    dense = [layer for layer in range(config.num_hidden_layers) if not config.is_moe_layer(layer)]
    hf = {name: getattr(moe, name) for name in (*_QWEN, "norm_topk_prob")}
    hf |= {"num_experts": moe.n_routed_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    shared = {"shared_expert_intermediate_size": moe.shared_expert_intermediate_size} if config.family == "qwen2_moe" else {}
    return hf | shared


def _deepseek_to_hf(config: ModelConfig, moe: MixtureOfExperts) -> dict[str, Any]:
    scoring, methods = _ROUTERS.get(config.family, _SIGMOID_ROUTER)
    hf = {name: getattr(moe, name) for name in (*_DEEPSEEK, "n_shared_experts", "n_group", "topk_group", "norm_topk_prob")}
    hf |= {"scoring_func": scoring, "topk_method": methods[moe.n_group > 1 and len(methods) > 1], "moe_layer_freq": 1}
    hf |= {"first_k_dense_replace": moe.first_k_dense_replace, "num_nextn_predict_layers": config.num_nextn_predict_layers}
    if config.family == "deepseek_v32":
        layers = range(config.num_hidden_layers)
        hf["mlp_layer_types"] = ["sparse" if config.is_moe_layer(layer) else "dense" for layer in layers]
    return hf
