"""What pruning can be told, and in what steps a model gets smaller: decided from its description, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.compress.config import NAMED
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.attention import heads_load_elsewhere
from lineshaft.model.shrink import resized, size_of
from lineshaft.model.units import Kind, Size, Units
from lineshaft.train.loop import LoopConfig
from lineshaft.train.optimiser import OptimiserConfig
from lineshaft.train.stage import FitConfig

Share = Annotated[float, Field(ge=0, le=0.9)]
Sizes = dict[Size, int]
REBUILD_STEPS = 100
"""What the recovery of the default length was measured with (docs/compression.md)."""
_KINDS: tuple[Kind, ...] = ("channels", "heads", "experts", "layers")


class PruneConfig(Config):
    """Structured pruning: units that are worth little are cut out in small steps, and what is left is trained after each."""

    model_config = NAMED
    step: Literal["prune"] = "prune"
    channels: Share = 0.0
    """Share of the channels inside feed-forward blocks to cut, those of experts included."""
    heads: Share = 0.0
    """Share of the heads; where query heads share keys and values, they go together."""
    experts: Share = 0.0
    """Share of the routed experts."""
    layers: Share = 0.0
    """Share of whole layers."""
    multiple: PositiveInt = 32
    """What channels are left is a multiple of this, the nearest one: kernels and groups of compressed weights then fit."""
    worth: Literal["taylor", "magnitude"] = "taylor"
    """taylor: (gradient x weight)^2 on calibration rows; magnitude: weight^2, without any data."""
    step_share: float = Field(0.05, gt=0, le=0.9)
    """Share of the units there were at first that goes in one step."""
    calibration_rows: PositiveInt = 64
    """Rows of training text on which gradients are taken before each step."""
    mend: bool = True
    """What reads the units that stay is fitted, on those rows, to what it gave with all of them (mend.py)."""
    rebuild_steps: int | None = Field(None, ge=0)
    """After the last step of cutting each layer is trained for so many steps to give what it gave before, without labels (rebuild.py).

    null: 100, and none where layers are cut."""
    rebuild_rows: PositiveInt = 256
    """Rows of training text that it does so on."""
    rebuild_lr: PositiveFloat = 2e-3
    """Highest learning rate of it."""
    recovery_steps: int = Field(0, ge=0)
    """Optimiser steps after each step of cutting but the last; 0: none."""
    last_recovery_steps: int | None = Field(400, ge=0)
    """After the last one; null: recovery_steps times the steps of cutting, so more than half of all."""
    lr: PositiveFloat = 3e-4
    """Highest learning rate of recovery, a tenth of that of the model's own training; it falls along half a cosine over all recoveries."""
    final_lr_share: float = Field(0.05, ge=0, le=1)
    """Learning rate at the last step, as a share of `lr`; 1: constant."""
    weight_decay: float = Field(0.1, ge=0)
    """Of AdamW, on the matrices that are left."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Decides the order of the text."""
    sequence_tokens: PositiveInt = 256
    """Tokens in a row, for calibration and recovery."""
    rows: PositiveInt = 8
    """Rows in a batch of recovery."""
    further_weight: float = Field(0.3, ge=0)
    """What the loss of multi-token-prediction layers counts for beside that of the next token; only for models that have some."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of recovery. auto: bfloat16 where the processor has AMX, else float32. Gradients for `worth` are always float32."""

    @model_validator(mode="after")
    def _something(self) -> PruneConfig:
        if not any(self.share_of(kind) for kind in _KINDS):
            raise ValueError(f"nothing is to be cut: set one of {', '.join(_KINDS)} above 0, such as channels 0.4")
        if self.layers and self.rebuild_steps:
            raise ValueError("layers and rebuild_steps: a layer that is gone can't be held against what it gave; set one of them to 0")
        return self

    @property
    def rebuilding_steps(self) -> int:
        """`rebuild_steps`, settled."""
        if self.rebuild_steps is not None:
            return self.rebuild_steps
        return 0 if self.layers else REBUILD_STEPS

    def share_of(self, kind: Kind) -> float:
        """The share of units of this kind to cut."""
        return float(getattr(self, kind))

    def recoveries(self, cuts: int) -> list[int]:
        """Optimiser steps after each of so many steps of cutting."""
        last = self.recovery_steps * cuts if self.last_recovery_steps is None else self.last_recovery_steps
        return [self.recovery_steps] * (cuts - 1) + [last]

    def training(self, steps: int) -> FitConfig:
        """So many steps at once, with the learning rates of all recoveries: what an equal-step control takes."""
        decay, low = self.weight_decay, self.final_lr_share
        optimiser = OptimiserConfig(peak_lr=self.lr, final_lr_share=low, warmup_share=0.0, weight_decay=decay)
        loop = LoopConfig(steps=max(1, steps), precision=self.precision, optimiser=optimiser)
        same = {name: getattr(self, name) for name in ("seed", "sequence_tokens", "rows", "further_weight")}
        return FitConfig(**same, loop=loop)


def schedule(model: Decoder, config: PruneConfig) -> list[Sizes]:
    """What the sizes that change are after each step; the last entry is the result. Steps that would cut nothing are left out.

    Raises ConfigError for a share of units that the model does not have, that rounds to nothing or leaves nothing, and for a result
    that no model of the family may be.
    """
    groups = {units.size: units.groups for units in model.units()}
    before, after = _targets(model, config)
    steps = math.ceil(max((before[size] - after[size]) / before[size] for size in after) / config.step_share - 1e-9)
    found = [before]
    for step in range(1, steps):
        cut = {size: _rounded(step * config.step_share * before[size], groups[size]) for size in after}
        found.append({size: max(after[size], before[size] - cut[size]) for size in after})
    return [sizes for earlier, sizes in zip([*found], [*found[1:], after], strict=True) if sizes != earlier]


def _targets(model: Decoder, config: PruneConfig) -> tuple[Sizes, Sizes]:
    """Sizes that are to change, before and after."""
    blocks = {units.size: units for units in model.units() if config.share_of(units.kind)}
    for kind in _KINDS:
        if config.share_of(kind) and kind not in {units.kind for units in blocks.values()}:
            raise ConfigError(f"prune: {kind}: this model has no {kind}: leave it out")
    before = {size: size_of(model.config, size) for size in blocks}
    after = {size: _left(config, units, before[size]) for size, units in blocks.items()}
    _check(model.config, config, after)
    return before, after


def _left(config: PruneConfig, units: Units, before: int) -> int:
    share, multiple = config.share_of(units.kind), config.multiple if units.kind == "channels" else units.groups
    after = _rounded(before * (1 - share), multiple)
    by = f" in steps of {multiple}" if multiple > 1 else ""
    for wrong, what, told in ((after >= before, "cuts none", "raise it"), (after < 1, "leaves none", "lower it")):
        if wrong:
            less = ", or lower multiple" if multiple > 1 and units.kind == "channels" else ""
            raise ConfigError(f"prune: {units.kind}: {share} of {units.size} {before}{by} {what}: {told}{less}")
    return after


def _rounded(number: float, multiple: int) -> int:
    """The nearest multiple, the lower one of two."""
    return multiple * math.ceil(number / multiple - 0.5 - 1e-9)


def _check(before: ModelConfig, config: PruneConfig, after: Mapping[Size, int]) -> None:
    """Refuse before the work what could not be described, or not be loaded elsewhere, after it."""
    left = resized(before, {size: number for size, number in after.items() if size != "num_hidden_layers"})
    if before.num_nextn_predict_layers and len(before.reach) > 1 and config.layers:
        raise ConfigError("prune: layers: where layers reach differently far, prediction layers reach as the first: leave layers out")
    if heads_load_elsewhere(before) and not heads_load_elsewhere(left):
        heads, hidden = left.attention.num_attention_heads, left.hidden_size
        told = f"transformers takes only a {left.family} whose heads divide hidden_size {hidden}: choose another share"
        raise ConfigError(f"prune: heads: {config.heads} leaves {heads} query heads; {told}")
