"""Units: the parts of one kind in a block, any of which can be taken out so that a smaller model of the same family is left.

Each block lists its own, once, from the modules it has; `Decoder.units` adds the layers. `shrink.without` takes units out. The sizes of a
family are one number for all layers (`Size`), so as many must go from every block that a number counts.

Shape letters: U units of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["channels", "heads", "experts", "layers"]
Size = Literal[
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_key_value_heads",
    "num_attention_heads",
    "n_routed_experts",
    "num_hidden_layers",
]
"""A number of ModelConfig, or of what it holds, that counts units. No two that are nested in it have one name."""


@dataclass(frozen=True)
class Place:
    """Where the units of a block lie in one tensor: one after another along an axis, each as wide as the others."""

    tensor: str
    """Its name in the model's state."""
    axis: int


@dataclass(frozen=True)
class Units:
    """Parts of one kind in one block."""

    name: str
    """Unique in the model, such as model.layers.0.mlp.intermediate."""
    kind: Kind
    size: Size
    """What counts them: blocks of one size keep the same number of units for each that the number counts."""
    count: int
    own: tuple[Place, ...]
    """What a unit works with. Two units that are equal here do the same."""
    readers: tuple[Place, ...] = ()
    """What takes in what units give, linearly: a unit that does another's work as well is read by the sum of both."""
    members: str | None = None
    """A list of modules; the first `count` of them are units' own as well, in order."""
    groups: int = 1
    """Units come in that many groups of neighbours, which must stay equally large."""
    alike: bool = True
    """Can one do another's work, if they are equal?"""


def rows(block: nn.Module, name: str, *linears: str) -> tuple[Place, ...]:
    """Weights and biases whose rows are units, of linear layers in a block that is called `name` below the model."""
    found = []
    for linear in linears:
        found.append(Place(f"{name}.{linear}.weight", 0))
        if getattr(block.get_submodule(linear), "bias", None) is not None:
            found.append(Place(f"{name}.{linear}.bias", 0))
    return tuple(found)
