"""What pruning needs in memory, told before weights are loaded."""

from __future__ import annotations

from functools import partial

from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.fit import Verdict
from lineshaft.model.memory import Kept, Memory, Packing
from lineshaft.train.preflight import Training, judge_training, train_memory


def prune_memory(given: Training, config: PruneConfig) -> Memory:
    """The first recovery, on nearly the whole model; gradients for worth need less. And a layer that is rebuilt, beside both models."""
    phases = dict(train_memory(given).phases)
    if config.rebuilding_steps:
        phases["rebuilding a layer"] = _rebuilding(given, config)
    return Memory(phases)


def _rebuilding(given: Training, config: PruneConfig) -> dict[str, int]:
    """As if nothing had been cut."""
    model, tokens = given.model, given.rows * given.sequence_tokens
    packings: tuple[Packing, ...] = ("whole", "mask", "alone")
    kept = [Kept(model, tokens, given.sequence_tokens, False, packing) for packing in packings]
    whole, hidden = 4 * cost_of(model).parameters, 4 * config.rebuild_rows * config.sequence_tokens * model.hidden_size
    activations = (each.layer(index) + each.way_back(index) for each in kept for index in range(model.num_hidden_layers))
    return {
        "weights, before and after": 2 * whole,
        f"hidden states of {config.rebuild_rows} rows, before and after": 2 * hidden,
        "a layer's copy, its gradients and AdamW's two moments": 4 * whole // model.num_hidden_layers,
        f"its activations of {tokens} tokens": max(activations),
    }


def judge_pruning(model: ModelConfig, config: PruneConfig, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    given = Training(model, config.rows, config.sequence_tokens, 1, config.precision)
    return judge_training(given, room, "prune", partial(prune_memory, config=config))
