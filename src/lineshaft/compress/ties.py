"""Which linear layers must share one format, worked out from what the model says of itself; and which formats fit them.

- Layers that read one junction inside one block (q, k and v; gate and up; the latents' a-projections): other engines lay them side by
  side in one matrix, and want one scheme for it.
- Routed experts: transformers decodes those of all layers with the first one's format, and gives other logits where they differ;
  vLLM wants one scheme for those of a layer. tests/compress/test_in_transformers.py shows the first, the second is by its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from lineshaft.base.errors import ConfigError
from lineshaft.compress.config import coding
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.moe import ExpertBlock
from lineshaft.ops.formats import DENSE, Format

Tied = Literal["model", "layer", "none"]
"""Which routed experts share one format: all of the model, those of a layer, or none; with `none` nothing else is tied either."""

_READS = " into "
"""Between the junction and the block whose layers read it, in the key that these are gathered by."""


@dataclass(frozen=True)
class Unit:
    """Linear layers that take one format."""

    name: str
    layers: tuple[str, ...]
    patterns: tuple[str, ...]
    """The same layers in the terms of a policy (CompressConfig.policy)."""


def units(model: Decoder, skip: Sequence[str] = (), tied: Tied = "model") -> list[Unit]:
    """Every linear layer that no pattern of `skip` means is in one of these, in the order in which the model runs them."""
    layers = [name for name in model.linears() if not any(fnmatchcase(name, pattern) for pattern in skip)]
    homes = _homes(model, tied)
    members: dict[str, list[str]] = {}
    for name in layers:
        members.setdefault(homes.get(name, name), []).append(name)
    left_out = model.linears().keys() - set(layers)
    return [Unit(_name_of(home, names), tuple(names), _patterns_of(model, names, left_out)) for home, names in members.items()]


def _homes(model: Decoder, tied: Tied) -> dict[str, str]:
    """What each layer that may have company is tied to."""
    if tied == "none":
        return {}
    homes = {}
    for junction in model.junctions():
        for port in junction.readers:
            homes[port.module] = f"{junction.name}{_READS}{port.module.rpartition('.')[0]}"
    for block in _expert_blocks(model):
        for name in _under(model, f"{block}.experts."):
            homes[name] = "experts" if tied == "model" else f"{block}.experts"
    return homes


def _expert_blocks(model: Decoder) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ExpertBlock)]


def _under(model: Decoder, prefix: str) -> list[str]:
    return [name for name in model.linears() if name.startswith(prefix)]


def _name_of(home: str, names: Sequence[str]) -> str:
    """For people: model.layers.0.self_attn.q_proj+k_proj+v_proj; what reads no junction, or is a routed expert, by its home."""
    if _READS not in home:
        return home
    block = names[0].rpartition(".")[0]
    return "+".join([names[0], *(name.removeprefix(f"{block}.") for name in names[1:])])


def _patterns_of(model: Decoder, names: Sequence[str], left_out: Iterable[str]) -> tuple[str, ...]:
    """Experts by one pattern a block, or a policy would have thousands of lines; one by one where some of a block are left out."""
    patterns, covered = [], set[str]()
    for block in _expert_blocks(model):
        own = _under(model, f"{block}.experts.")
        if own and set(own) <= set(names) and not set(own) & set(left_out):
            patterns.append(f"{block}.experts.*")
            covered |= set(own)
    return (*patterns, *(name for name in names if name not in covered))


def fitting(model: Decoder, unit: Unit, formats: Sequence[str]) -> dict[str, Format]:
    """Those of the formats that every layer of the unit can take, by name. Raises ConfigError where there are none."""
    linears = [linear_of(model, name) for name in unit.layers]
    found, refused = {}, ""
    for name in formats:
        try:
            for linear in linears:
                bytes_of(linear, coding(name))
            found[name] = coding(name)
        except ConfigError as error:
            refused = str(error)
    if not found:
        raise ConfigError(f"{unit.name}: none of {', '.join(formats)} fits ({refused}): offer smaller groups or dense, or skip it")
    return found


def bytes_of(linear: Linear, fmt: Format) -> int:
    """Bytes of the tensors that would hold this layer's weight. Raises ConfigError where its inputs do not fit."""
    if fmt == DENSE:
        return linear.in_features * linear.out_features * linear.weight.element_size()
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in fmt.empty(linear.out_features, linear.in_features).values())


def linear_of(model: Decoder, name: str) -> Linear:
    """The layer of this name, one of `model.linears()`."""
    linear = model.get_submodule(name)
    assert isinstance(linear, Linear)
    return linear
