"""What finding formats for a budget needs in memory, beside the rounding that follows; told before weights are loaded."""

from __future__ import annotations

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.compress import sensitivity
from lineshaft.compress.plan import BudgetConfig
from lineshaft.compress.preflight import CODE_BYTES, Compressing, compress_memory
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import Product, layer_part, products
from lineshaft.model.fit import Verdict, judge
from lineshaft.model.memory import ITEM, Kept, Memory, Stored, Terms
from lineshaft.model.packed_memory import PackedPass

_TABLES = 5
"""Of so many rows' chances in float64: both sides, and what their divergence is worked out from."""
_COPIES = 12
"""Bytes a weight of the largest layer while it is rounded: as in compress_memory."""


def budget_memory(model: ModelConfig, stored: Stored, config: BudgetConfig) -> Memory:
    """The measure's phase, then those of rounding. The source is counted whole, as there: a measure goes over it again and again."""
    planning = _by_running if config.measure == "kl" else _by_gradients
    terms = {"weights as stored": stored.total(model), **planning(model, stored, config)}
    return Memory({"measuring": terms, **compress_memory(Compressing(model, stored, tuple(config.formats))).phases})


def _by_running(model: ModelConfig, stored: Stored, config: BudgetConfig) -> Terms:
    """Logits with and without a unit rounded, their chances a piece at a time; the unit's codes; and a row on its way."""
    tokens, item = config.row_tokens, ITEM[stored.dtype]
    pieces = min(tokens, sensitivity.ROWS_AT_ONCE)
    going = max(PackedPass(model, stored, tokens, tokens).layer(layer) for layer in range(model.num_hidden_layers))
    return {
        "logits before and after": 2 * item * tokens * model.vocab_size,
        "chances in float64": _TABLES * 8 * pieces * model.vocab_size,
        "the largest unit as rounded": _largest_unit(model, stored, config) + _COPIES * max(item.size for item in _linear(model)),
        "a row on its way": 2 * item * tokens * model.hidden_size + going,
    }


def _by_gradients(model: ModelConfig, stored: Stored, config: BudgetConfig) -> Terms:
    """Squares or sums of gradients of every layer; those of one row; and what autograd keeps until they are there."""
    item, weights = ITEM[stored.dtype], sum(item.count * item.size for item in _linear(model))
    kept = max(Kept(model, config.row_tokens, config.row_tokens, packing=packing).total() for packing in ("whole", "mask", "alone"))
    return {
        "sums of gradients": 4 * weights,
        "gradients of a row": item * weights,
        f"activations of {config.row_tokens} tokens": kept * item // 4,
        "loss, on the way back": 2 * 4 * config.row_tokens * model.vocab_size,
    }


def _linear(model: ModelConfig) -> list[Product]:
    return [item for item in products(model) if item.linear]


def _largest_unit(model: ModelConfig, stored: Stored, config: BudgetConfig) -> int:
    """Of what is rounded together (ties.py): all experts of the model, those of a layer, or a layer's largest product."""
    forms = [Stored(stored.dtype, name) for name in config.formats]
    layers = [[item for item in layer_part(model, layer).products if item.linear] for layer in range(model.num_hidden_layers)]
    sizes = [sum(max(form.one(item) for form in forms) * item.count for item in layer if item.count > 2) for layer in layers]
    alone = max(max(form.one(item) for form in forms) * min(item.count, 2) for layer in layers for item in layer)
    return max(alone, {"model": sum(sizes), "layer": max(sizes), "none": 0}[config.tied])


def judge_budget(model: ModelConfig, stored: Stored, config: BudgetConfig, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    own = resident_memory_bytes() + CODE_BYTES
    return judge("budget", config, (), lambda given: budget_memory(model, stored, given), own, room)
