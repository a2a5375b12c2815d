"""Which ops a model runs, from its description alone: `lineshaft check` looks up the kernel of each. Free of torch."""

from __future__ import annotations

from typing import Literal

from lineshaft.model.config import LatentAttention, ModelConfig


def ops_used(config: ModelConfig, fmt: str, task: Literal["serve", "train"], native: bool = False) -> list[str]:
    """Names of ops/table that a task may call. `fmt` as in memory.Stored: layers in it are multiplied in it, others dense.

    `native`: serving with the native kernels, which take packed weights; what they can't take stays as it is.
    """
    whole = "linear_int_a8" if fmt.endswith("-a8") else "linear_int"
    coded = {"int8": whole, "int4": whole, "fp8": "linear_fp8"}.get(fmt.partition("-")[0])
    found = {"embed", "angles", "linear", "rms_norm", "rope", "silu_mul", "add"}
    if config.moe is not None and (config.moe.scoring_func == "sigmoid" or config.moe.shared_expert_intermediate_size):
        found.add("sigmoid")
    latent = isinstance(config.attention, LatentAttention)
    indexer = isinstance(config.attention, LatentAttention) and config.attention.indexer is not None
    if task == "train":
        found |= {"rows_gqa", "reach_gqa"} | ({"attention"} if indexer else set())
        return sorted(found)
    found |= {coded} if coded else set()
    found |= {"write_pages", *(["by_head"] if latent else [])}
    if native:
        found |= {"packed_linear"}
        found -= {"linear_int", "linear_int_a8"} | (set() if config.moe or indexer else {"linear"})
    found.add("paged_attention" if native and not indexer else "tile_mla" if latent else "tile_gqa")
    return sorted(found)
