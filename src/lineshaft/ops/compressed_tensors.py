"""The words of compressed-tensors in `quantization_config`: groups of layers in integer formats. quantization.py reads both dialects.

With several formats each group lists its layers by name, so that every reader gives a layer one scheme whatever it prefers when
targets overlap. With one format the target is the class "Linear", as compressed-tensors itself writes it; beside it stands the name of a
compressed head, which is of another class in vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.ops.formats import DENSE, Activations, Dense, Format, Integer

Table = Mapping[str, Any]
Wanted = tuple[tuple[str, object, tuple[object, ...]], ...]

INTEGER = (
    "integer weights by compressed-tensors, one scale a channel or group: INT8 (symmetric, pack-quantized or int-quantized) or INT4 "
    "(pack-quantized), activations untouched or INT8 (symmetric; dynamic, a scale a token, or static, one for all)"
)
_SCALES = {False: "token", True: "tensor"}
"""Whether activations have one scale for all, to the word for it."""
_MIXED = "mixed-precision"
_HEAD = "lm_head"


def to_config(formats: Mapping[str, Format]) -> dict[str, Any]:
    """The table for layers in these formats, Dense or Integer, at least one of them Integer. The format of most layers is group_0."""
    members: dict[Integer, list[str]] = {}
    for name in sorted(formats):
        if isinstance(fmt := formats[name], Integer):
            members.setdefault(fmt, []).append(name)
    ordered = sorted(members, key=lambda fmt: (-len(members[fmt]), members[fmt][0]))
    alone = len(ordered) == 1
    packings = {fmt.packing for fmt in ordered}
    every = ["Linear", *(name for name in members[ordered[0]] if name == _HEAD)]
    groups = {f"group_{number}": _group(fmt, every if alone else members[fmt], alone) for number, fmt in enumerate(ordered)}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(name for name, item in formats.items() if isinstance(item, Dense)),
    }


def _group(fmt: Integer, targets: list[str], alone: bool) -> dict[str, Any]:
    strategy = "group" if fmt.group else "channel"
    weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, "strategy": strategy, "group_size": fmt.group}
    group: dict[str, Any] = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    if fmt.activations is not None:
        static = fmt.activations == "int8-static"
        group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": _SCALES[static], "dynamic": not static}
    if not alone or fmt.packing != ("pack-quantized" if fmt.activations is None else "int-quantized"):
        group["format"] = fmt.packing  # compressed-tensors goes by this, and guesses the other where it is missing
    return group


def from_config(config: Table, layers: Iterable[str]) -> dict[str, Format]:
    """The format of each layer. What no group targets, or `ignore` names, is dense.

    Of several targets that mean a layer an exact name comes before a pattern, and that before the class "Linear"; two groups of one
    rank are refused. Raises UnsupportedModel, BadCheckpoint, and what a broken table raises.
    """
    listed = list(layers)
    groups: dict[str, Table] = dict(config["config_groups"])
    if not groups:
        raise UnsupportedModel(f"quantization_config: 0 config_groups are not supported; supported: {INTEGER}")
    targets = {name: [str(item) for item in group["targets"]] for name, group in groups.items()}
    known = {*listed, "Linear"}
    for name, items in targets.items():
        # A name with a dot may be that of a layer that this file does not have, such as a prediction layer's.
        if unknown := [item for item in items if not item.startswith("re:") and "." not in item and item not in known]:
            told = f'quantization_config: {name}: targets "{unknown[0]}"'
            raise UnsupportedModel(f'{told} are not supported; supported: {INTEGER}; of targets "Linear", names, patterns after "re:"')
    formats = {name: _integer_of(config, group) for name, group in groups.items()}
    ignored, meant = _Targets(config.get("ignore") or ()), {name: _Targets(items) for name, items in targets.items()}
    found: dict[str, Format] = {}
    for layer in listed:
        group_name = None if ignored.name(layer) or ignored.pattern(layer) else _group_of(layer, meant)
        found[layer] = DENSE if group_name is None else formats[group_name]
    return found


class _Targets:
    """Entries of `targets` or `ignore`: names, patterns after "re:", or the class "Linear".

    Names are a set: a mixture of DeepSeek-V3's size lists 45,000 of them, and each layer is looked up in all groups.
    """

    def __init__(self, items: Iterable[object]) -> None:
        listed = [str(item) for item in items]
        self._names = {item for item in listed if not item.startswith("re:")}
        self._patterns = [re.compile(item[3:]) for item in listed if item.startswith("re:")]

    def name(self, layer: str) -> bool:
        """Is the layer named?"""
        return layer in self._names

    def pattern(self, layer: str) -> bool:
        """Does a pattern mean the layer?"""
        return any(pattern.match(layer) for pattern in self._patterns)

    def every(self, layer: str) -> bool:
        """Is every linear layer meant?"""
        return "Linear" in self._names


def _group_of(layer: str, targets: Mapping[str, _Targets]) -> str | None:
    """The group whose target means this layer most closely."""
    for means in (_Targets.name, _Targets.pattern, _Targets.every):
        if matching := [name for name, items in targets.items() if means(items, layer)]:
            if len(matching) > 1:
                raise BadCheckpoint(f"quantization_config: {matching[0]} and {matching[1]} both target {layer}")
            return matching[0]
    return None


def refuse_others(wanted: Wanted, supported: str) -> None:
    """Raises UnsupportedModel for the first (name, value, values that we run) whose value is none of them."""
    for name, value, known in wanted:
        if value not in known:
            raise UnsupportedModel(f"quantization_config: {name} {value!r} is not supported; supported: {supported}")


def _integer_of(config: Table, group: Table) -> Integer:
    weights, packing = group["weights"], group.get("format") or config["format"]
    wanted: Wanted = (
        ("format", packing, ("pack-quantized", "int-quantized")),
        ("quantization_status", config.get("quantization_status", "compressed"), ("compressed",)),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None, {})),
        ("sparsity_config", config.get("sparsity_config"), (None, {})),
        ("transform_config", config.get("transform_config"), (None, {})),
        ("output_activations", group.get("output_activations"), (None,)),
        ("num_bits", weights["num_bits"], (8, 4) if packing == "pack-quantized" else (8,)),
        ("type", weights["type"], ("int",)),
        ("symmetric", weights["symmetric"], (True, False) if weights["num_bits"] == 4 else (True,)),
        ("strategy", weights["strategy"], ("channel", "group")),
        ("actorder", weights.get("actorder"), (None, False, "weight", "static")),
    )
    refuse_others(wanted, INTEGER)
    activations = _activations_of(group.get("input_activations"))
    size = weights["group_size"] if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise BadCheckpoint(f"quantization_config: group_size {size!r} is not a number of inputs")
    return Integer(weights["num_bits"], size, weights["symmetric"], activations, packing)


def _activations_of(scheme: Table | None) -> Activations | None:
    """None where activations are untouched. What is left out means what it does in compressed-tensors."""
    if scheme is None:
        return None
    dynamic = scheme.get("dynamic", False)
    wanted: Wanted = (
        ("input_activations: num_bits", scheme.get("num_bits", 8), (8,)),
        ("input_activations: type", scheme.get("type", "int"), ("int",)),
        ("input_activations: symmetric", scheme.get("symmetric", True), (True,)),
        ("input_activations: dynamic", dynamic, (True, False)),
        ("input_activations: strategy", scheme.get("strategy", "tensor"), (_SCALES[not dynamic],)),
    )
    refuse_others(wanted, INTEGER)
    return "int8" if dynamic else "int8-static"
