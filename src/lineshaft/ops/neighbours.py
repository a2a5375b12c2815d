"""Packed weights that meet the same activations: what an op that takes several of them at once is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lineshaft.ops.packing import Shape

MOST = 4
"""Weights that one call of the library takes (native/src/module.cpp)."""


@dataclass(frozen=True)
class Neighbours:
    """Weights that are alike but for their outputs."""

    packed: tuple[Tensor, ...]
    """uint8, see ops/packing.py."""
    shapes: tuple[Shape, ...]
    biases: tuple[Tensor | None, ...]
    whole: bool = False
    """Activations are rounded to 8 bits, as in `reference_packed.packed_linear`."""
    input_scale: float = 0.0


def alike(shapes: tuple[Shape, ...]) -> bool:
    """Do activations meet weights of these shapes in the same form, so that they may be neighbours?"""
    return 0 < len(shapes) <= MOST and len({replace(shape, outputs=1) for shape in shapes}) == 1
