"""Rotary positions of a config.json, both ways.

transformers 4 writes rope_scaling beside rope_theta, transformers 5 one table rope_parameters. Where a file has both,
the first wins, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lineshaft.base.errors import UnsupportedModel
from lineshaft.model.config import ModelConfig

Hf = Mapping[str, Any]

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ),
}


def read_rope(hf: Hf) -> dict[str, Any]:
    """rope_theta and rope_scaling. Raises UnsupportedModel naming what we can't turn by."""
    family, table = hf["model_type"], hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(part, Mapping) for part in table.values()):
        raise UnsupportedModel(f"{family}: rotary positions that differ between layers (rope_parameters) are not supported yet")
    if _either(table, hf, "partial_rotary_factor", 1) != 1:
        raise UnsupportedModel(f"{family}: rotating only a part of each head (partial_rotary_factor) is not supported yet")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind != "default" and kind not in _FIELDS:
        raise UnsupportedModel(f'{family}: rope scaling "{kind}" is not supported yet; supported: {", ".join(_FIELDS)}')
    if kind not in ("default", "yarn") and table.get("mscale_all_dim") and family.startswith("deepseek"):
        raise UnsupportedModel(f'{family}: mscale_all_dim with rope scaling "{kind}" is not supported yet')
    theta = _either(table, hf, "rope_theta", 1000000.0 if family == "mixtral" else 10000.0)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **_fields(kind, table, hf)}}


def _fields(kind: str, table: Hf, hf: Hf) -> dict[str, Any]:
    """What the table says of each of our fields; null counts as silence."""
    found = {name: table[name] for name in _FIELDS[kind] if table.get(name) is not None}
    if kind in ("llama3", "yarn"):
        trained = hf.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = trained or hf["max_position_embeddings"]
    if kind == "yarn":
        found.setdefault("factor", hf["max_position_embeddings"] / found["original_max_position_embeddings"])
    return found


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of both spellings."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    said = {name: value for name, value in scaling.model_dump().items() if value is not None}
    for silent in ("mscale", "mscale_all_dim"):
        if not said.get(silent, 1):
            del said[silent]
    table = {**said, "rope_theta": theta}
    return {"rope_theta": theta, "rope_parameters": table, "rope_scaling": {**table, "type": said["rope_type"]}}


def _either(first: Hf, second: Hf, name: str, default: Any) -> Any:
    """The value of `name` in one of two tables; null counts as absent."""
    value = first.get(name, second.get(name))
    return default if value is None else value
