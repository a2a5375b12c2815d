"""How the weight of a linear layer is stored, and how it is multiplied by.

A format encodes a dense weight into named tensors, decodes them back, multiplies by them, and describes itself in the
words of compressed-tensors, so that transformers and vLLM read what we write. Names of the tensors in a format are the
names in the checkpoint: nothing is renamed or rearranged between disk and product.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops import reference, table

Tensors = Mapping[str, Tensor]


_SMALLEST_FP16 = 2.0**-24


class Format(Protocol):
    """One way to store the weight of a linear layer."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold one weight."""

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors of this format for a dense weight. Raises ConfigError when its shape does not fit."""

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes for a weight [outputs, inputs], on the default device, to be loaded into."""

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The dense weight [O, I] that a product with these tensors multiplies by."""

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """x W^T + b as [T, O]."""

    def describe(self) -> str:
        """For people, such as `int8, one scale a channel`."""


@dataclass(frozen=True)
class Dense:
    """The weight as it is, in the dtype it has."""

    tensor_names: tuple[str, ...] = ("weight",)

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        return {"weight": weight_OI}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return {"weight": torch.empty(outputs, inputs)}

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return tensors["weight"].to(dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear(x_TI, tensors["weight"], bias_O)

    def describe(self) -> str:
        """See Format."""
        return "dense"


@dataclass(frozen=True)
class Int8:
    """Symmetric INT8 weights, activations untouched; one FP16 scale a channel, or one a group of inputs.

    scale = max|w| / 127 over the group, rounded to FP16 first, then w is rounded to the nearest multiple of it: the
    rounding uses the scale that the product will use. With groups of 32 a weight takes 8 + 16/32 = 8.5 bits.
    """

    group: int | None = None
    tensor_names: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """See Format."""
        outputs, inputs = weight_OI.shape
        groups = self._groups(inputs)
        grouped_OGI = weight_OI.detach().float().reshape(outputs, groups, -1)
        limit_OG = grouped_OGI.abs().amax(-1)
        scale_OG = (limit_OG / 127).clamp(min=_SMALLEST_FP16).to(torch.float16)
        # Near zero FP16 has steps as coarse as its numbers: one that was rounded down would cut the largest weights off.
        scale_OG += _SMALLEST_FP16 * (scale_OG.float() * 127.5 < limit_OG)
        if not torch.isfinite(scale_OG).all():
            raise ConfigError("a weight is not a number or too large for INT8 with FP16 scales (its scale exceeds 65504)")
        codes = (grouped_OGI / scale_OG.float()[:, :, None]).round().clamp(-128, 127).flatten(1)
        packed = (codes.to(torch.int16) + 128).to(torch.uint8).contiguous().view(torch.int32)
        return {"weight_packed": packed, "weight_scale": scale_OG, "weight_shape": torch.tensor([outputs, inputs])}

    def empty(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """See Format."""
        return {
            "weight_packed": torch.empty(outputs, inputs // 4, dtype=torch.int32),
            "weight_scale": torch.empty(outputs, self._groups(inputs), dtype=torch.float16),
            "weight_shape": torch.empty(2, dtype=torch.int64),
        }

    def _groups(self, inputs: int) -> int:
        width = self.group or inputs
        if inputs % width or inputs % 4:
            unit = width if inputs % width else 4
            raise ConfigError(f"int8: {inputs} inputs are not a multiple of {unit}; choose another group or leave this layer out")
        return inputs // width

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """See Format."""
        return reference.unpack_int8(tensors["weight_packed"], tensors["weight_scale"], dtype)

    def matmul(self, x_TI: Tensor, tensors: Tensors, bias_O: Tensor | None) -> Tensor:
        """See Format."""
        return table.linear_int8(x_TI, tensors["weight_packed"], tensors["weight_scale"], bias_O)

    def describe(self) -> str:
        """See Format."""
        return f"int8, one scale a {'channel' if self.group is None else f'group of {self.group}'}"


DENSE = Dense()
_READ = "weight-only symmetric INT8 by compressed-tensors, pack-quantized, one scale a channel or group"


def to_compressed_tensors(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The `quantization_config` of config.json for layers in these formats, or None when all are dense.

    Raises ConfigError for a mixture of quantised formats, which this layout can hold but we do not write yet.
    """
    quantised = {name: item for name, item in formats.items() if isinstance(item, Int8)}
    if not quantised:
        return None
    kinds = set(quantised.values())
    if len(kinds) > 1:
        raise ConfigError("layers in different quantised formats can't be saved in one checkpoint yet")
    (kind,) = kinds
    assert isinstance(kind, Int8)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group" if kind.group else "channel", "group_size": kind.group}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(name for name, item in formats.items() if isinstance(item, Dense)),
    }


def from_compressed_tensors(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Format]:
    """The format of each of these linear layers, as a `quantization_config` names it.

    Raises UnsupportedModel for a scheme that we do not read, BadCheckpoint when the table is broken.
    """
    try:
        if (method := config["quant_method"]) != "compressed-tensors":
            raise UnsupportedModel(f'quantization by "{method}" is not supported; supported: {_READ}')
        groups = list(config["config_groups"].values())
        if len(groups) != 1:
            raise UnsupportedModel(f"quantization_config: {len(groups)} config_groups are not supported; supported: {_READ}")
        fmt, ignore = _int8_of(config, groups[0]), [str(item) for item in config.get("ignore") or ()]
        return {name: DENSE if any(_names(item, name) for item in ignore) else fmt for name in layers}
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise BadCheckpoint(f"quantization_config can't be read: {error!r}") from None


def _int8_of(config: Mapping[str, Any], group: Mapping[str, Any]) -> Int8:
    weights = group["weights"]
    wanted: tuple[tuple[str, object, tuple[object, ...]], ...] = (
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
    for name, value, known in wanted:
        if value not in known:
            raise UnsupportedModel(f"quantization_config: {name} {value!r} is not supported; supported: {_READ}")
    if weights["strategy"] == "channel":
        return Int8()
    if not isinstance(weights["group_size"], int) or weights["group_size"] < 1:
        raise BadCheckpoint(f"quantization_config: group_size {weights['group_size']!r} is not a number of inputs")
    return Int8(weights["group_size"])


def _names(item: str, layer: str) -> bool:
    """Does an entry of `ignore` mean this layer? Entries are names, or patterns after "re:"."""
    return re.match(item[3:], layer) is not None if item.startswith("re:") else item == layer
