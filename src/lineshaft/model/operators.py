"""Which ops a model runs, from its description alone: `lineshaft check` looks up the kernel of each. Free of torch."""

from __future__ import annotations

from typing import Literal

from lineshaft.model.config import LatentAttention, ModelConfig


def ops_used(config: ModelConfig, fmt: str, task: Literal["serve", "train"], native: bool = False, pages8: bool = False) -> list[str]:
    """Names of ops/table that a task may call. `fmt` as in memory.Stored: layers in it are multiplied in it, others dense.

    `native`: serving with the native kernels, which take packed weights; what they can't take stays as it is.
    `pages8`: with cache pages in 8 bits, which only these read.
    """
    whole = "linear_int_a8" if fmt.endswith("-a8") else "linear_int"
    coded = {"int8": whole, "int4": whole, "fp8": "linear_fp8"}.get(fmt.partition("-")[0])
    found = {"embed", "angles", "linear", "rms_norm", "rope", "silu_mul", "add"} | _mixed(config)
    latent = isinstance(config.attention, LatentAttention)
    indexer = isinstance(config.attention, LatentAttention) and config.attention.indexer is not None
    if indexer:
        found |= {"layer_norm", "join"}
    if task == "train":
        found |= {"rows_gqa", "reach_gqa", *(["join"] if latent else [])} | ({"attention"} if indexer else set())
        return sorted(found)
    found |= {"sample", "write_codes" if pages8 else "write_pages", *([coded] if coded else []), *(["by_head"] if latent else [])}
    if native:
        found = _by_native_kernels(config, found)
    paged = "coded_attention" if pages8 else "paged_attention"
    found.add(paged if native else "tile_mla" if latent else "tile_gqa")
    return sorted(found)


def _mixed(config: ModelConfig) -> set[str]:
    """Of a mixture of experts, beside those of its feed-forward blocks."""
    moe = config.moe
    if moe is None:
        return set()
    gated = bool(moe.shared_expert_intermediate_size)
    return {"route", *(["sigmoid"] if gated else []), *(["scaled"] if gated or moe.n_added_experts else [])}


def _by_native_kernels(config: ModelConfig, found: set[str]) -> set[str]:
    """Weights that the kernels take are packed; what is not (odd widths) stays as it is."""
    a, moe, layers = config.attention, config.moe, range(config.num_hidden_layers)
    found = found - {"linear", "linear_int", "linear_int_a8", "linear_fp8", "silu_mul", "add"}
    found |= {"packed_linear", "packed_linears", "packed_swiglu"}
    if isinstance(a, LatentAttention):
        if a.qk_nope_head_dim % 4 == 0 and a.kv_lora_rank % 4 == 0:
            found = found - {"by_head"} | {"packed_by_head"}
        found |= {"join", *(["widen", "choose_keys"] if a.indexer else [])}
    if moe is not None:
        found |= {"widen", "experts", "add"}
        beside = moe.n_shared_experts or moe.shared_expert_intermediate_size or moe.n_added_experts
        if not beside and all(config.is_moe_layer(layer) for layer in layers):
            found.remove("packed_swiglu")
    return found
