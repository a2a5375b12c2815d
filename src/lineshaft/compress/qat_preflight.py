"""What quantisation-aware training needs in memory, told before weights are loaded."""

from __future__ import annotations

from functools import partial

from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import Product, products
from lineshaft.model.fit import Verdict
from lineshaft.model.memory import Memory, integer_of
from lineshaft.train.preflight import Training, judge_training, train_memory
from lineshaft.train.stage import FitConfig

_COPIES = 6
"""Float32 copies of a weight, at most, while the gradients of its ranges are worked out."""
_RANGE_BYTES = 48
"""Of a range: scale and shift, each a parameter with gradient and two moments, and both once more as they are rounded to."""


def qat_memory(given: Training, formats: tuple[str, ...]) -> Memory:
    """What training needs; and the rounded weights, which products keep for the way back; and ranges, as many as the finest format has.

    Which layers stay dense is not looked at.
    """
    linear = [item for item in products(given.model) if item.linear]
    terms = {
        "weights as rounded": sum(4 * item.count * item.size for item in linear),
        "ranges of weights": sum(_RANGE_BYTES * item.count * _ranges(item, formats) for item in linear),
        "one layer while it is rounded": _COPIES * 4 * max(item.size for item in linear),
    }
    if any(name.endswith("-a8") for name in formats):
        tokens = given.rows * given.sequence_tokens
        terms[f"activations of {tokens} tokens as rounded"] = sum(4 * tokens * item.used * item.inputs for item in linear)
    return Memory({phase: {**held, **terms} for phase, held in train_memory(given).phases.items()})


def _ranges(item: Product, formats: tuple[str, ...]) -> int:
    """The most ranges that one of these matrices has in one of these formats."""
    widths = (integer_of(name)[1] or item.inputs for name in formats)
    return max(item.outputs * -(-item.inputs // width) for width in widths)


def judge_qat(model: ModelConfig, config: FitConfig, formats: tuple[str, ...], room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    given = Training(model, config.rows, config.sequence_tokens, config.loop.accumulate, config.loop.precision)
    return judge_training(given, room, "qat", partial(qat_memory, formats=formats))
