"""Which layer is stored in which format, in the words of `quantization_config` in config.json.

Two ways of saying it are read and written: compressed-tensors (our INT8) and DeepSeek's (FP8 by blocks). transformers
and vLLM read both. What we can't run exactly is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops.formats import DENSE, Dense, Format, Fp8Block, Int8

Table = Mapping[str, Any]
Wanted = tuple[tuple[str, object, tuple[object, ...]], ...]

_INT8 = "weight-only symmetric INT8 by compressed-tensors, pack-quantized, one scale a channel or group"
_FP8 = "FP8 (e4m3) weights with one scale a block, as DeepSeek-V3 ships them"


def to_quantization_config(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The `quantization_config` for layers in these formats, by their names in the file, or None when all are dense.

    Name every module that holds a matrix, compressed or not, since other tools compress what they are not told to leave.
    Raises ConfigError for a mixture of quantised formats, which we do not write.
    """
    kinds = {item for item in formats.values() if not isinstance(item, Dense)}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ConfigError("layers in different quantised formats can't be saved in one checkpoint yet")
    (kind,) = kinds
    left = sorted(name for name, item in formats.items() if isinstance(item, Dense))
    if isinstance(kind, Int8):
        return _int8_to_config(kind, left)
    assert isinstance(kind, Fp8Block)
    scale = {"scale_fmt": "ue8m0"} if kind.power_of_two else {}
    blocks = {"weight_block_size": list(kind.block), "modules_to_not_convert": left}
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | blocks | scale


def _int8_to_config(kind: Int8, left: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group" if kind.group else "channel", "group_size": kind.group}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
    }


def from_quantization_config(config: Table, layers: Iterable[str], stored: Container[str]) -> dict[str, Format]:
    """The format of each of these linear layers, by their names in the file; `stored` holds the names of all tensors there.

    A layer is FP8 where its weight_scale_inv is stored: DeepSeek's configs do not list what they leave alone.
    Raises UnsupportedModel for a scheme that we do not read, BadCheckpoint when the table is broken.
    """
    try:
        if (method := config["quant_method"]) == "fp8":
            block = _fp8_of(config)
            return {name: block if f"{name}.weight_scale_inv" in stored else DENSE for name in layers}
        if method != "compressed-tensors":
            raise UnsupportedModel(f'quantization by "{method}" is not supported; supported: {_INT8}; {_FP8}')
        groups = list(config["config_groups"].values())
        if len(groups) != 1:
            raise UnsupportedModel(f"quantization_config: {len(groups)} config_groups are not supported; supported: {_INT8}")
        fmt, ignore = _int8_of(config, groups[0]), [str(item) for item in config.get("ignore") or ()]
        return {name: DENSE if any(_names(item, name) for item in ignore) else fmt for name in layers}
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise BadCheckpoint(f"quantization_config can't be read: {error!r}") from None


def _refuse_others(wanted: Wanted, supported: str) -> None:
    """Raises UnsupportedModel for the first (name, value, values that we run) whose value is none of them."""
    for name, value, known in wanted:
        if value not in known:
            raise UnsupportedModel(f"quantization_config: {name} {value!r} is not supported; supported: {supported}")


def _fp8_of(config: Table) -> Fp8Block:
    wanted: Wanted = (
        ("fmt", config.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn")),
        ("activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic",)),
        ("scale_fmt", config.get("scale_fmt"), (None, "float", "ue8m0")),
        ("expert_dtype", config.get("expert_dtype", "fp8"), ("fp8",)),
        ("modules_to_convert", config.get("modules_to_convert"), (None, [])),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None, {})),
    )
    _refuse_others(wanted, _FP8)
    block = config.get("weight_block_size")
    if block is None:
        raise UnsupportedModel(f"quantization_config: no weight_block_size (one scale a tensor) is not supported; supported: {_FP8}")
    sizes = isinstance(block, list) and [size for size in block if type(size) is int and size > 0]
    if not sizes or sizes != block or len(sizes) != 2:
        raise BadCheckpoint(f"quantization_config: weight_block_size {block!r} is not a number of outputs and a number of inputs")
    return Fp8Block((sizes[0], sizes[1]), power_of_two=config.get("scale_fmt") == "ue8m0")


def _int8_of(config: Table, group: Table) -> Int8:
    weights = group["weights"]
    wanted: Wanted = (
        ("format", group.get("format") or config["format"], ("pack-quantized",)),
        ("quantization_status", config.get("quantization_status", "compressed"), ("compressed",)),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None, {})),
        ("sparsity_config", config.get("sparsity_config"), (None, {})),
        ("transform_config", config.get("transform_config"), (None, {})),
        ("targets", group["targets"], (["Linear"],)),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("num_bits", weights["num_bits"], (8,)),
        ("type", weights["type"], ("int",)),
        ("symmetric", weights["symmetric"], (True,)),
        ("strategy", weights["strategy"], ("channel", "group")),
        ("actorder", weights.get("actorder"), (None, False, "weight", "static")),
    )
    _refuse_others(wanted, _INT8)
    if weights["strategy"] == "channel":
        return Int8()
    if not isinstance(weights["group_size"], int) or weights["group_size"] < 1:
        raise BadCheckpoint(f"quantization_config: group_size {weights['group_size']!r} is not a number of inputs")
    return Int8(weights["group_size"])


def _names(item: str, layer: str) -> bool:
    """Does an entry of `ignore` mean this layer? Entries are names, or patterns after "re:"."""
    return re.match(item[3:], layer) is not None if item.startswith("re:") else item == layer
