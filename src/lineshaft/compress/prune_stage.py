"""The pruning stage: a checkpoint and tokens to a smaller checkpoint, in steps of cutting and recovery.

Scratch holds `cuts`, the whole model after each finished step, and `recovery-N`, the training states of step N. A run that was killed goes
on from the newest of them; a step whose recovery had begun is cut once more, to the same bits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lineshaft.base.config import load
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import bar, say
from lineshaft.compress.calibrate.rows import Surroundings, surrounded
from lineshaft.compress.mend import mend
from lineshaft.compress.prune import evenly, least_worthy, squared_gradients
from lineshaft.compress.prune_plan import PruneConfig, Sizes, schedule
from lineshaft.compress.prune_preflight import judge_pruning
from lineshaft.compress.rebuild import Rebuilding, rebuild
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.shrink import each, size_of, twin, without
from lineshaft.records.tokens import TokenStream
from lineshaft.text import contract
from lineshaft.train import loop, state
from lineshaft.train.batches import Batch, RowReader, ShuffledRows
from lineshaft.train.objective import NextToken
from lineshaft.train.optimiser import OptimiserConfig, learning_rate
from lineshaft.train.stage import check_context, check_dense, check_tokenizer, settled, write_history

WARM_UP = 0.1
"""Share of each recovery in which the learning rate rises."""


@dataclass
class Pruning:
    """A model on its way, and what was seen of it."""

    model: Decoder
    history: state.History = field(default_factory=list)
    """Of all recoveries; steps and tokens are counted through."""
    rebuilt: tuple[float, float] | None = None
    """What layers gave otherwise than before, as a share, before and after they were rebuilt."""


@dataclass(frozen=True)
class Text:
    """Rows to take gradients on, and to train on."""

    reader: RowReader
    config: PruneConfig

    def calibration(self, step: int) -> list[Batch]:
        """Single rows, others in each step of cutting."""
        rows = ShuffledRows(self.reader, 1, self.config.seed)
        first = step * self.config.calibration_rows
        return [rows[first + number] for number in range(self.config.calibration_rows)]

    def rebuilding(self, model: ModelConfig) -> list[Surroundings]:
        """Batches as layers of such a model see them."""
        rows = ShuffledRows(self.reader, self.config.rows, self.config.seed)
        return [surrounded(rows[number], model) for number in range(math.ceil(self.config.rebuild_rows / self.config.rows))]

    def recovery(self, first: int) -> _Later:
        """Batches from this one on."""
        return _Later(ShuffledRows(self.reader, self.config.rows, self.config.seed), first)


@dataclass(frozen=True)
class _Later:
    rows: ShuffledRows
    first: int

    def __getitem__(self, number: int) -> Batch:
        return self.rows[self.first + number]


def prune(model: Decoder, steps: Sequence[Sizes], text: Text, config: PruneConfig, scratch: Path) -> Pruning:
    """Cut and recover, step by step (`schedule` says which). Dense weights, float32; `model` may be changed.

    After the last step of cutting layers are rebuilt, if at all: as they were when the model was last trained.

    `config.precision` must be settled. What was finished lies in `scratch`; an interrupted run continues there to the same bits. Raises
    TrainingError when loss or gradient are no longer numbers.
    """
    done, pruning = _resumed(scratch / "cuts", model)
    recoveries = config.recoveries(len(steps))
    trained = twin(pruning.model if any(recoveries[:done]) else model)  # mending changes what is cut
    with bar("prune", len(steps), done=done) as progress:
        for step in range(done, len(steps)):
            pruning.model = cut(pruning.model, steps[step], text.calibration(step), config)
            if config.rebuilding_steps and step + 1 == len(steps):
                how = Rebuilding(config.rebuilding_steps, config.rebuild_lr, config.seed)
                pruning.rebuilt = rebuild(pruning.model, trained, text.rebuilding(trained.config), how)
            if recoveries[step]:
                _recover(pruning, text, config, Recovery(step, recoveries), scratch / f"recovery-{step}")
                trained = twin(pruning.model)
            _keep(scratch / "cuts", step + 1, pruning)
            shutil.rmtree(scratch / f"recovery-{step}", ignore_errors=True)
            progress.advance(1, ", ".join(f"{size} {number}" for size, number in steps[step].items()))
    return pruning


def cut(model: Decoder, sizes: Sizes, rows: list[Batch], config: PruneConfig) -> Decoder:
    """One step: the least worthy units of every block go until these are its sizes."""
    fisher = squared_gradients(model, rows, NextToken(config.further_weight)) if config.worth == "taylor" else evenly(model)
    cuts = []
    for units in model.units():
        kept = each(model.config, units) * sizes.get(units.size, size_of(model.config, units.size))
        if kept < units.count:
            cuts.append(least_worthy(model, units, fisher, units.count - kept))
    if config.mend:
        mend(model, cuts, rows, NextToken(config.further_weight))
    return without(model, cuts)


@dataclass(frozen=True)
class Recovery:
    """The training after one step of cutting, as a part of all."""

    step: int
    counts: list[int]
    """Optimiser steps of each recovery."""

    @property
    def first(self) -> int:
        """Optimiser steps before it."""
        return sum(self.counts[: self.step])

    def rate(self, optimiser: OptimiserConfig, step: int) -> float:
        """Of a step of this one: on one curve over all of them, with a warm-up, since AdamW knows nothing yet of what was cut."""
        warm = max(1, round(WARM_UP * self.counts[self.step]))
        return learning_rate(optimiser, self.first + step, sum(self.counts)) * min(1.0, (step + 1) / warm)


def _recover(pruning: Pruning, text: Text, config: PruneConfig, recovery: Recovery, scratch: Path) -> None:
    planned, first = config.training(recovery.counts[recovery.step]).loop, recovery.first
    pruning.model.requires_grad_(True)
    objective, rate = NextToken(config.further_weight), partial(recovery.rate, planned.optimiser)
    trained = loop.run(pruning.model, text.recovery(first), objective, planned, scratch, rate)
    pruning.model.requires_grad_(False)
    tokens = pruning.history[-1]["tokens"] if pruning.history else 0
    for entry in trained.history:
        counted = {"step": first + entry["step"], "tokens": tokens + entry["tokens"]}
        pruning.history.append(entry | counted | {"cuts": recovery.step + 1})


def _keep(folder: Path, done: int, pruning: Pruning) -> None:
    about = {"model": pruning.model.config.model_dump(mode="json"), "history": pruning.history, "done": done, "rebuilt": pruning.rebuilt}
    state.write(folder, done, dict(pruning.model.state_dict()), about)


def _resumed(folder: Path, model: Decoder) -> tuple[int, Pruning]:
    """Steps done before, and what they left."""
    if (found := state.newest(folder)) is None:
        return 0, Pruning(model)
    tensors, about = found
    smaller = Decoder(load(ModelConfig, about["model"], where=str(folder))).eval().requires_grad_(False)
    smaller.load_state_dict(tensors)
    return int(about["done"]), Pruning(smaller, about["history"], about["rebuilt"])


# -- the stage --------------------------------------------------------------------------------------------------------


def _settle(config: PruneConfig, parents: Mapping[str, Artifact]) -> PruneConfig:
    check_tokenizer("prune", parents["checkpoint"], parents["tokens"])
    check_context("prune", config.training(1), load_config(parents["checkpoint"].root))
    return config.model_copy(update={"precision": settled(config.training(1)).loop.precision})


def _build(draft: Draft, config: PruneConfig) -> None:
    checkpoint, tokens = draft.parents["checkpoint"], draft.parents["tokens"]
    contract.check_folder(checkpoint.root)
    judge_pruning(load_config(checkpoint.root), config).enforce()
    model = load_checkpoint(checkpoint.root, dtype=torch.float32)
    check_dense("prune", model, checkpoint, "prune the dense checkpoint and compress the result")
    before, steps = model.config, schedule(model, config)
    text = Text(RowReader(TokenStream(tokens, "train"), config.sequence_tokens), config)
    pruning = prune(model, steps, text, config, draft.scratch)
    save_checkpoint(pruning.model, draft.root, checkpoint.root)
    draft.facts |= contract.carried(checkpoint, draft.root) | _facts(before, pruning.model.config, steps[-1])
    if pruning.history:
        write_history(draft.root, pruning.history)
        draft.facts |= {"tokens": int(pruning.history[-1]["tokens"]), "final_loss": pruning.history[-1]["loss"]}
    if pruning.rebuilt is not None:
        draft.facts |= {"rebuilt": list(pruning.rebuilt)}
    draft.aside |= {"threads": torch.get_num_threads()}
    say(f"prune: {', '.join(f'{size} {was} to {now}' for size, (was, now) in draft.facts['cut'].items())}")


def _facts(before: ModelConfig, after: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """What was really cut: a size whose last block went with its layer stays as it was then."""
    was, now = cost_of(before), cost_of(after)
    return {
        "parameters": now.parameters,
        "active_parameters": now.active_parameters,
        "parameters_before": was.parameters,
        "format": "dense",
        "cut": {size: [size_of(before, size), size_of(after, size)] for size in sizes},
    }


PRUNE = Stage(
    name="prune",
    kind="checkpoint",
    version=3,
    config=PruneConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
