"""Which layer is stored in which format, in the words of `quantization_config` in config.json.

Two ways of saying it are read and written: compressed-tensors (integers) and DeepSeek's (FP8 by blocks). transformers
and vLLM read both. What we can't run exactly is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops.formats import DENSE, Dense, Format, Fp8Block, Integer

Table = Mapping[str, Any]
Wanted = tuple[tuple[str, object, tuple[object, ...]], ...]

_INTEGER = (
    "integer weights by compressed-tensors, one scale a channel or group: INT8 (symmetric, pack-quantized or int-quantized) or INT4 "
    "(pack-quantized), activations untouched or INT8 (symmetric, dynamic, a scale a token)"
)
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
    if isinstance(kind, Integer):
        return _integer_to_config(kind, left)
    assert isinstance(kind, Fp8Block)
    scale = {"scale_fmt": "ue8m0"} if kind.power_of_two else {}
    blocks = {"weight_block_size": list(kind.block), "modules_to_not_convert": left}
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | blocks | scale


def _integer_to_config(kind: Integer, left: list[str]) -> dict[str, Any]:
    strategy = "group" if kind.group else "channel"
    weights = {"num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric, "strategy": strategy, "group_size": kind.group}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    if kind.activations is not None:
        group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if kind.packing != ("pack-quantized" if kind.activations is None else "int-quantized"):
        group["format"] = kind.packing  # compressed-tensors goes by this, and guesses the other where it is missing
    return {
        "quant_method": "compressed-tensors",
        "format": kind.packing,
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
            raise UnsupportedModel(f'quantization by "{method}" is not supported; supported: {_INTEGER}; {_FP8}')
        groups = list(config["config_groups"].values())
        if len(groups) != 1:
            raise UnsupportedModel(f"quantization_config: {len(groups)} config_groups are not supported; supported: {_INTEGER}")
        fmt, ignore = _integer_of(config, groups[0]), [str(item) for item in config.get("ignore") or ()]
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


def _integer_of(config: Table, group: Table) -> Integer:
    weights, packing = group["weights"], group.get("format") or config["format"]
    wanted: Wanted = (
        ("format", packing, ("pack-quantized", "int-quantized")),
        ("quantization_status", config.get("quantization_status", "compressed"), ("compressed",)),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None, {})),
        ("sparsity_config", config.get("sparsity_config"), (None, {})),
        ("transform_config", config.get("transform_config"), (None, {})),
        ("targets", group["targets"], (["Linear"],)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("num_bits", weights["num_bits"], (8, 4) if packing == "pack-quantized" else (8,)),
        ("type", weights["type"], ("int",)),
        ("symmetric", weights["symmetric"], (True, False) if weights["num_bits"] == 4 else (True,)),
        ("strategy", weights["strategy"], ("channel", "group")),
        ("actorder", weights.get("actorder"), (None, False, "weight", "static")),
    )
    _refuse_others(wanted, _INTEGER)
    activations = _activations_of(group.get("input_activations"))
    size = weights["group_size"] if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise BadCheckpoint(f"quantization_config: group_size {size!r} is not a number of inputs")
    return Integer(weights["num_bits"], size, weights["symmetric"], activations, packing)


def _activations_of(scheme: Table | None) -> Literal["int8"] | None:
    """None where activations are untouched. What is left out means what it does in compressed-tensors."""
    if scheme is None:
        return None
    wanted: Wanted = (
        ("input_activations: num_bits", scheme.get("num_bits", 8), (8,)),
        ("input_activations: type", scheme.get("type", "int"), ("int",)),
        ("input_activations: symmetric", scheme.get("symmetric", True), (True,)),
        ("input_activations: dynamic", scheme.get("dynamic", False), (True,)),
        ("input_activations: strategy", scheme.get("strategy"), ("token",)),
    )
    _refuse_others(wanted, _INTEGER)
    return "int8"


def _names(item: str, layer: str) -> bool:
    """Does an entry of `ignore` mean this layer? Entries are names, or patterns after "re:"."""
    return re.match(item[3:], layer) is not None if item.startswith("re:") else item == layer
