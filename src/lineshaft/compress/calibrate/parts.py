"""The parts of a model that are calibrated one after another: its layers, the head, layers that predict further ahead.

Shape letters: T tokens, I hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lineshaft.compress.calibrate.observe import Inputs, Wanted, watching
from lineshaft.compress.calibrate.rows import Surroundings
from lineshaft.model.decoder import Decoder
from lineshaft.model.junction import Junction
from lineshaft.model.layer import Layer
from lineshaft.model.linear import Linear
from lineshaft.model.mtp import PredictionLayer


class Part(ABC):
    """Some modules of a model, and how hidden states go through them."""

    def __init__(self, model: Decoder, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names
        """Names of the modules that belong to this part alone."""

    @abstractmethod
    def run(self, x_TI: Tensor, around: Surroundings) -> Tensor:
        """Hidden states before this part to those after it, [T, I]."""

    def observe(
        self, hidden: list[Tensor], rows: list[Surroundings], linears: Mapping[str, Linear], wanted: Wanted, advance: bool = False
    ) -> dict[str, Inputs]:
        """What comes into these layers. `advance`: the hidden states become in place those after the part, as by `advance`."""
        with watching(linears, wanted) as seen:
            for x_TI, around in zip(hidden, rows, strict=True):
                after_TI = self.run(x_TI, around)
                if advance:
                    x_TI.copy_(after_TI)
        return seen

    def advance(self, hidden: list[Tensor], rows: list[Surroundings]) -> None:
        """Turn the hidden states before the part into those after it, in place: they are the most that a walk holds."""
        for x_TI, around in zip(hidden, rows, strict=True):
            x_TI.copy_(self.run(x_TI, around))

    def linears(self) -> dict[str, Linear]:
        """The linear layers of this part by their names in the model."""
        return {name: module for name, module in self.modules() if isinstance(module, Linear)}

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules of this part by their names in the model."""
        for name in self.names:
            yield from self.model.get_submodule(name).named_modules(prefix=name)

    def junctions(self) -> list[Junction]:
        """Those of which this part has the readers."""
        return [item for item in self.model.junctions() if all(self.holds(port.module) for port in item.readers)]

    def holds(self, name: str) -> bool:
        """Whether this module, or tensor, is one of this part's."""
        return any(name == own or name.startswith(f"{own}.") for own in self.names)


class LayerPart(Part):
    """A layer of the trunk."""

    def __init__(self, model: Decoder, index: int) -> None:
        super().__init__(model, (f"model.layers.{index}",))
        layer = model.model.layers[index]
        assert isinstance(layer, Layer)
        self.layer = layer

    def run(self, x_TI: Tensor, around: Surroundings) -> Tensor:
        """See Part."""
        return self.layer(x_TI, around.rotate, around.attend)


class HeadPart(Part):
    """The final norm and the output projection. The projection is not run, which would cost more than many layers."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model, ("model.norm",) if model.lm_head is None else ("model.norm", "lm_head"))

    def run(self, x_TI: Tensor, around: Surroundings) -> Tensor:
        """See Part; the states stay what they were before the norm."""
        return x_TI

    def observe(
        self, hidden: list[Tensor], rows: list[Surroundings], linears: Mapping[str, Linear], wanted: Wanted, advance: bool = False
    ) -> dict[str, Inputs]:
        """See Part."""
        if "lm_head" not in linears:
            return {}
        found = Inputs(linears["lm_head"].in_features, wanted)
        for x_TI in hidden:
            found.add(self.model.model.norm(x_TI))
        return {"lm_head": found}


class PredictionPart(Part):
    """A layer for multi-token prediction; the first one takes what the final norm gives."""

    def __init__(self, model: Decoder, depth: int) -> None:
        index = model.config.num_hidden_layers + depth
        super().__init__(model, (f"model.layers.{index}",))
        layer = model.model.layers[index]
        assert isinstance(layer, PredictionLayer)
        self.layer, self.depth = layer, depth

    def run(self, x_TI: Tensor, around: Surroundings) -> Tensor:
        """See Part."""
        x_TI = x_TI if self.depth else self.model.model.norm(x_TI)
        next_T = around.next_T
        for _ in range(self.depth):
            next_T = torch.cat([next_T[1:], next_T[-1:]])  # at the end of a document its neighbour's: it only fills the place
        return self.layer.predict(x_TI, self.model.model.embed_tokens(next_T), around.rotate, around.attend)


def parts_of(model: Decoder) -> list[Part]:
    """In the order in which hidden states go through them; each module but the embedding belongs to one."""
    trunk: list[Part] = [LayerPart(model, index) for index in range(model.config.num_hidden_layers)]
    further = [PredictionPart(model, depth) for depth in range(model.config.num_nextn_predict_layers)]
    return [*trunk, HeadPart(model), *further]
