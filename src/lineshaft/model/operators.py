"""Which ops a model runs, from its description alone: `lineshaft check` looks up the kernel of each. Free of torch."""

from __future__ import annotations

from typing import Literal

from lineshaft.model.config import LatentAttention, ModelConfig


def ops_used(config: ModelConfig, fmt: str, task: Literal["serve", "train"]) -> list[str]:
    """Names of ops/table that a task may call. `fmt` as in memory.Stored: layers in it are multiplied in it, others dense."""
    whole = "linear_int_a8" if fmt.endswith("-a8") else "linear_int"
    coded = {"int8": whole, "int4": whole, "fp8": "linear_fp8"}.get(fmt.partition("-")[0])
    found = ["linear", "rms_norm", "rope", "silu_mul", *([coded] if coded and task == "serve" else [])]
    if config.moe is not None and (config.moe.scoring_func == "sigmoid" or config.moe.shared_expert_intermediate_size):
        found.append("sigmoid")
    latent = isinstance(config.attention, LatentAttention)
    indexer = isinstance(config.attention, LatentAttention) and config.attention.indexer is not None
    if task == "train":
        found += ["rows_gqa", "reach_gqa", *(["attention"] if indexer else [])]
    else:
        found += ["tile_mla", "by_head"] if latent else ["tile_gqa"]
    return sorted(found)
