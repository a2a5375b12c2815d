"""How much a model is hurt when one unit of it (ties.py) is stored in fewer bits: measured. Estimates are in estimates.py.

Shape letters: T tokens, V vocabulary, I inputs, R rows that are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.base.terminal import bar
from lineshaft.compress.ties import Unit, fitting, linear_of
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.rope import rotation
from lineshaft.ops import table as ops
from lineshaft.ops.formats import DENSE, Format
from lineshaft.train.batches import IGNORE, Batch

Damage = dict[str, dict[str, float]]
"""Unit to format to nats a predicted token."""

ROWS_AT_ONCE = 256
"""Rows of chances that are held in float64 at a time."""


@torch.inference_mode()
def divergences(model: Decoder, batches: Sequence[Batch], units: Sequence[Unit], formats: Sequence[str]) -> Damage:
    """Mean Kullback-Leibler of the next token's chances, before to after, with only one unit in one format at a time.

    Formats that do not fit a unit are left out; `dense` does no damage. Tokens that predict nothing (targets IGNORE) do not count.
    What lies before a unit's first layer is run once a batch; from there it is run on once for each format: about half the layers on
    average. A batch's logits [T, V] are held twice. Prediction layers do no damage: no answer depends on them.
    Raises ConfigError for a layer that is compressed already, a unit that no format fits, and batches without targets.
    """
    forms = offered(model, units, formats)
    firsts = {unit.name: _first_layer(model, unit) for unit in units}
    found: Damage = {name: dict.fromkeys(of_unit, 0.0) for name, of_unit in forms.items()}
    targets = targets_of(batches)
    with at_rest(model), bar("measure", len(batches) * sum(map(len, forms.values()))) as progress:
        for batch in batches:
            walk = _Walk(model, batch)
            before_RV = walk.logits_after()
            for unit in sorted(units, key=lambda unit: firsts[unit.name]):
                walk.advance_to(firsts[unit.name])
                for name, fmt in forms[unit.name].items():
                    if fmt != DENSE and firsts[unit.name] <= model.config.num_hidden_layers:
                        with _stored_as(model, unit, fmt):
                            found[unit.name][name] += _divergence(before_RV, walk.logits_after()) / targets
                    progress.advance(note=unit.name)
    return found


def offered(model: Decoder, units: Sequence[Unit], formats: Sequence[str]) -> dict[str, dict[str, Format]]:
    """By unit the formats that fit it. Raises ConfigError for a layer that is compressed already, and a unit that none fits."""
    for name in (name for unit in units for name in unit.layers):
        if (fmt := linear_of(model, name).format) != DENSE:
            raise ConfigError(f"{name} is stored as {fmt.describe()}: sensitivity is measured on the dense model")
    return {unit.name: fitting(model, unit, formats) for unit in units}


def targets_of(batches: Sequence[Batch]) -> int:
    """Tokens that predict something. Raises ConfigError where there are none."""
    count = sum(int((batch.targets_T != IGNORE).sum()) for batch in batches)
    if not count:
        raise ConfigError("the calibration rows predict nothing: each of their tokens ends a document")
    return count


@contextmanager
def at_rest(model: Decoder) -> Iterator[None]:
    """As when it answers: routers do not count."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Walk:
    """One batch on its way through the layers, which can be run to the end from where it stands, again and again."""

    def __init__(self, model: Decoder, batch: Batch) -> None:
        self.model, self.at = model, 0
        self.rows_R = (batch.targets_T != IGNORE).nonzero()[:, 0]
        self.attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        self.rotate = rotation(model.config, batch.positions_T)
        self.x_TI = ops.embed(batch.tokens_T, model.model.embed_tokens.weight)

    def advance_to(self, layer: int) -> None:
        """Stand before this layer; behind the last one for what comes after."""
        layer = min(layer, self.model.config.num_hidden_layers)
        self.x_TI, self.at = self._through(self.x_TI, self.at, layer), max(self.at, layer)

    def logits_after(self) -> Tensor:
        """Logits [R, V] of the tokens that predict something, from here to the end."""
        x_TI = self._through(self.x_TI, self.at, self.model.config.num_hidden_layers)
        return self.model.logits(self.model.model.norm(x_TI)[self.rows_R])

    def _through(self, x_TI: Tensor, first: int, last: int) -> Tensor:
        for layer in self.model.model.layers[first:last]:
            x_TI = layer(x_TI, self.rotate, self.attend)
        return x_TI


def _first_layer(model: Decoder, unit: Unit) -> int:
    """The first layer that the unit changes; that behind the last for the head, one more for prediction layers alone."""
    count = model.config.num_hidden_layers
    numbers = [int(name.split(".")[2]) if name.startswith("model.layers.") else count for name in unit.layers]
    on_the_way = [number for number, name in zip(numbers, unit.layers, strict=True) if number < count or name == "lm_head"]
    return min(on_the_way, default=count + 1)


def _divergence(before_RV: Tensor, after_RV: Tensor) -> float:
    """Summed over rows, in float64: what is left of the difference of float32 logarithms would be mostly noise."""
    total = 0.0
    for first in range(0, len(before_RV), ROWS_AT_ONCE):
        p, q = (F.log_softmax(logits[first : first + ROWS_AT_ONCE].double(), -1) for logits in (before_RV, after_RV))
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total


@contextmanager
def _stored_as(model: Decoder, unit: Unit, fmt: Format) -> Iterator[None]:
    """Others stand in for the unit's layers, which are not touched: even the order of their parameters stays."""
    own = {name: linear_of(model, name) for name in unit.layers}
    try:
        for name, linear in own.items():
            model.set_submodule(name, _stand_in(linear, fmt))
        yield
    finally:
        for name, linear in own.items():
            model.set_submodule(name, linear)


def _stand_in(linear: Linear, fmt: Format) -> Linear:
    with torch.device("meta"):
        other = Linear(linear.in_features, linear.out_features)
    other.hold(fmt, fmt.encode(linear.dense_weight(torch.float32)))
    other.bias = linear.bias
    return other
