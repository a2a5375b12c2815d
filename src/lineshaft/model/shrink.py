"""Making a finished model smaller: units (units.py) are taken out, and what is left is an ordinary model of the same family."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.units import Place, Size, Units

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """Units to take out of one block."""

    units: Units
    gone: Mapping[int, int | None]
    """Each unit that goes, in this order, and the unit that does its work from then on: what read both adds up there. None: nobody does."""

    @property
    def kept(self) -> list[int]:
        """The units that stay."""
        return [unit for unit in range(self.units.count) if unit not in self.gone]


@torch.no_grad()
def without(model: Decoder, cuts: Sequence[Cut]) -> Decoder:
    """A model that has what the cuts leave, ready to answer, without gradients. It shares memory with `model` where nothing was cut.

    Dense weights only. A unit whose stand-in is its equal goes without a trace but for the rounding of one sum. Raises ConfigError for cuts
    that leave nothing, that leave blocks of one size unlike, or that no description of a model allows.
    """
    config = _described(model, cuts)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for cut in cuts:
        _take_out(tensors, cut)
    for cut in sorted(cuts, key=lambda cut: cut.units.kind == "layers"):  # experts lie below layers: these are renumbered last
        tensors = _renumbered(tensors, cut)
    with torch.device("meta"):
        smaller = Decoder(config)
    smaller.load_state_dict(tensors, assign=True)
    for router in smaller.routers():
        router.load = torch.zeros(router.load.shape)
    return smaller.eval().requires_grad_(False)


def twin(model: Decoder) -> Decoder:
    """A model of the same tensors, in modules of its own: it stays what it is when others are put into `model`."""
    return without(model, [])


def _take_out(tensors: Tensors, cut: Cut) -> None:
    count = cut.units.count
    for place in cut.units.readers:
        tensors[place.tensor] = with_stand_ins(tensors[place.tensor], place, cut)
    kept = torch.tensor(cut.kept)
    for place in (*cut.units.own, *cut.units.readers):
        blocks = torch.unflatten(tensors[place.tensor], place.axis, (count, -1))
        tensors[place.tensor] = blocks.index_select(place.axis, kept).flatten(place.axis, place.axis + 1)


def with_stand_ins(tensor: Tensor, place: Place, cut: Cut) -> Tensor:
    """A copy with what reads each unit that goes added to what reads its stand-in."""
    blocks = torch.unflatten(tensor.clone(), place.axis, (cut.units.count, -1))
    for unit, other in cut.gone.items():
        if other is not None:
            blocks.select(place.axis, other).add_(blocks.select(place.axis, unit))
    return blocks.flatten(place.axis, place.axis + 1)


def _renumbered(tensors: Tensors, cut: Cut) -> Tensors:
    """Without the members that go, the others counted anew; those that are no units stand behind them, as before."""
    if cut.units.members is None:
        return tensors
    before, numbers = f"{cut.units.members}.", {old: new for new, old in enumerate(cut.kept)}
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not name.startswith(before):
            found[name] = tensor
            continue
        number, _, rest = name.removeprefix(before).partition(".")
        new = numbers.get(int(number), int(number) - len(cut.gone) if int(number) >= cut.units.count else None)
        if new is not None:
            found[f"{before}{new}.{rest}"] = tensor
    return found


# -- the description --------------------------------------------------------------------------------------------------


def size_of(config: ModelConfig, size: Size) -> int:
    """The number of this name."""
    return int(next(getattr(part, size) for part in (config, config.attention, config.moe) if hasattr(part, size)))


def each(config: ModelConfig, units: Units) -> int:
    """Units of this block for one that its size counts: two shared experts lie in one block of twice the channels."""
    return units.count // size_of(config, units.size)


def resized(config: ModelConfig, sizes: Mapping[Size, int], layers_gone: Collection[int] = ()) -> ModelConfig:
    """The description with these numbers in place of its own. Raises ConfigError where no model is so."""
    return _with_layers(config, _with_sizes(config, sizes), layers_gone)


def _described(model: Decoder, cuts: Sequence[Cut]) -> ModelConfig:
    gone = {cut.units.name: cut.gone.keys() for cut in cuts}
    sizes: dict[Size, int] = {}
    for units in model.units():
        kept, times = units.count - len(gone.get(units.name, ())), each(model.config, units)
        if kept < 1:
            raise ConfigError(f"{units.name}: nothing is left of its {units.count} {units.kind}: cut fewer")
        if kept % times or sizes.setdefault(units.size, kept // times) != kept // times:
            raise ConfigError(f"{units.name}: {kept} {units.kind} are left, elsewhere {units.size} is {sizes.get(units.size)}: cut as many")
    return resized(model.config, sizes, gone.get("model.layers", ()))


def _with_sizes(config: ModelConfig, sizes: Mapping[Size, int]) -> dict[str, Any]:
    table = config.model_dump()
    for part in (table, table["attention"], table["moe"] or {}):
        part |= {size: number for size, number in sizes.items() if size in part}
    if isinstance(config.attention, GroupedQueryAttention):
        shared = config.attention.num_attention_heads // config.attention.num_key_value_heads
        table["attention"]["num_attention_heads"] = shared * table["attention"]["num_key_value_heads"]
    if config.family == "mixtral" and config.moe is not None and config.moe.moe_intermediate_size == config.intermediate_size:
        table["intermediate_size"] = table["moe"]["moe_intermediate_size"]  # its config.json has one number for both
    return table


def _with_layers(config: ModelConfig, table: dict[str, Any], gone: Collection[int]) -> ModelConfig:
    """What is said of single layers, said of those that stay."""
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in gone]
    if gone and len(config.reach) > 1:
        if config.num_nextn_predict_layers:
            raise ConfigError("layers can't be cut where layers reach differently far and prediction layers reach as the first: leave them")
        table["reach"] = [config.reach_of(layer).model_dump() for layer in kept]
    if config.moe is not None and gone:
        dense = [place for place, layer in enumerate(kept) if not config.is_moe_layer(layer)]
        first = next((place for place in range(len(kept)) if place not in dense), len(kept))
        table["moe"] |= {"first_k_dense_replace": first, "mlp_only_layers": [place for place in dense if place > first]}
    return load(ModelConfig, table, where="a smaller model")
