"""Bits where they do most good: from a dense model, calibration rows and a budget to a policy of formats by layer.

    plan(model, calibration(tokens, config), config).policy     # CompressConfig(policy=...) takes it

Each unit (ties.py) is rated in each format on offer (sensitivity.py, estimates.py), and budget.py finds the formats of least summed
damage. Damages of units that are rounded together do not add up exactly: `Plan.damage` is a forecast, `evaluate` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact
from lineshaft.compress.budget import Option, Options, allocate
from lineshaft.compress.estimates import fisher, gradient
from lineshaft.compress.sensitivity import Damage, divergences
from lineshaft.compress.ties import Tied, Unit, bytes_of, fitting, linear_of, units
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import is_format
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import Batch, RowReader

Measure = Literal["kl", "fisher", "gradient"]
MEASURES: Mapping[Measure, Callable[[Decoder, Sequence[Batch], Sequence[Unit], Sequence[str]], Damage]] = {
    "kl": divergences,
    "fisher": fisher,
    "gradient": gradient,
}


class BudgetConfig(Config):
    """A size, and what may be done to reach it."""

    bits: PositiveFloat
    """Bits a weight on average, scales included, over the linear layers that `skip` does not name."""
    formats: list[str] = ["int8", "int4-32", "int4-128"]
    """What a layer may become, in the words of `policy`. A layer is offered those of them that fit its inputs."""
    skip: list[str] = ["lm_head"]
    """Layers left as they are, not counted: names or patterns."""
    measure: Measure = "kl"
    """kl: run the model once for each unit and format; fisher or gradient: one backward pass, and an estimate."""
    tied: Tied = "model"
    """Experts in one format over the whole model, as transformers needs it, or over each layer. none: every matrix by itself, those that
    other engines join as well."""
    rows: PositiveInt = 16
    """Calibration rows, spread evenly over the training text."""
    row_tokens: PositiveInt = 256
    """Tokens in each."""

    @model_validator(mode="after")
    def _known(self) -> BudgetConfig:
        if not self.formats:
            raise ValueError("formats: name at least one, such as int8")
        for name in self.formats:
            if name == "fp8" or not is_format(name):
                raise ValueError(
                    f'formats: "{name}" is none: formats are dense, int8, int4, int8-32, int4-128, int4-32-zeros, int8-a8, ...'
                )
        return self


class Choice(Config):
    """What was found for the layers of one unit."""

    layers: list[str]
    format: str
    """Of those in `bytes`."""
    bytes: dict[str, int]
    """What they take in each format on offer."""
    damage: dict[str, float]
    """Nats a token with only these layers rounded."""


class Plan(Config):
    """Formats by layer that fit a budget. `model_dump_json()` writes it, `config.load(Plan, json.loads(text))` reads it."""

    policy: dict[str, str]
    """For CompressConfig.policy; of every layer that was not skipped."""
    weights: int
    """In these layers."""
    bytes: int
    """That these layers take, scales included."""
    damage: float
    """Sum over the units, nats a token: a forecast, since errors of several layers meet."""
    units: dict[str, Choice]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights


def plan(model: Decoder, batches: Sequence[Batch], config: BudgetConfig) -> Plan:
    """The policy of least damage within the budget, for a dense model; it is left as it was.

    Exact in the sum of the units' damages. Raises ConfigError for a budget below what the smallest formats take, telling how much
    that is, and as ties.fitting and the measures do.
    """
    own = units(model, config.skip, config.tied)
    if not own:
        raise ConfigError("plan: skip leaves no layer to choose a format for")
    longest, most = max(int(batch.positions_T.max()) + 1 for batch in batches), model.config.max_position_embeddings
    if longest > most:
        raise ConfigError(f"plan: rows of {longest} tokens exceed the model's max_position_embeddings {most}: lower row_tokens")
    weights = sum(linear_of(model, name).in_features * linear_of(model, name).out_features for unit in own for name in unit.layers)
    sizes = {unit.name: _sizes(model, unit, config.formats) for unit in own}
    least = 8 * sum(min(of_unit.values()) for of_unit in sizes.values()) / weights
    if (budget := int(config.bits * weights / 8)) < least * weights / 8:
        raise ConfigError(f"plan: {config.bits:g} bits a weight can't be reached: {', '.join(config.formats)} take at least {least:.4f}")
    damage = MEASURES[config.measure](model, batches, own, config.formats)
    options: Options = {unit: {name: Option(size, damage[unit][name]) for name, size in of_unit.items()} for unit, of_unit in sizes.items()}
    found = allocate(options, budget)
    return Plan(
        policy={pattern: found.formats[unit.name] for unit in own for pattern in unit.patterns},
        weights=weights,
        bytes=found.bytes,
        damage=found.damage,
        units={
            unit.name: Choice(layers=list(unit.layers), format=found.formats[unit.name], bytes=sizes[unit.name], damage=damage[unit.name])
            for unit in own
        },
    )


def _sizes(model: Decoder, unit: Unit, formats: Sequence[str]) -> dict[str, int]:
    """Bytes of the unit's layers in each format that fits them."""
    linears = [linear_of(model, name) for name in unit.layers]
    return {name: sum(bytes_of(linear, fmt) for linear in linears) for name, fmt in fitting(model, unit, formats).items()}


def calibration(tokens: Artifact, config: BudgetConfig) -> list[Batch]:
    """The config's rows of the training text, a batch a row. Raises TrainingError for a text shorter than one row."""
    reader = RowReader(TokenStream(tokens, "train"), config.row_tokens)
    places = np.unique(np.linspace(0, reader.rows - 1, config.rows).astype(np.int64))
    return [reader.batch(places[place : place + 1]) for place in range(len(places))]
