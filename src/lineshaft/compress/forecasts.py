"""What each step of compression needs in memory, in one table: the same forecasts by which the steps refuse what can't fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lineshaft.base.config import Table, load
from lineshaft.base.errors import ConfigError
from lineshaft.compress.budget_preflight import judge_budget
from lineshaft.compress.budget_stage import BudgetStepConfig
from lineshaft.compress.calibrate_preflight import Calibrating, judge_calibrating
from lineshaft.compress.calibrate_preflight import Config as Calibrated
from lineshaft.compress.config import CompressConfig, Rounding, in_memory
from lineshaft.compress.distil_preflight import judge_distilling
from lineshaft.compress.distil_stage import DistilConfig, planned
from lineshaft.compress.preflight import Compressing, judge_compressing
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.compress.prune_preflight import judge_pruning
from lineshaft.compress.qat_preflight import judge_qat
from lineshaft.compress.qat_stage import QatConfig
from lineshaft.compress.steps import STEPS
from lineshaft.model.config import ModelConfig
from lineshaft.model.fit import Verdict
from lineshaft.model.memory import Stored


def _round(model: ModelConfig, stored: Stored, config: CompressConfig, room: int | None) -> Verdict:
    return judge_compressing(Compressing(model, stored, config.formats), room)


def _calibrated(model: ModelConfig, stored: Stored, config: Calibrated, room: int | None) -> Verdict:
    return judge_calibrating(Calibrating.of(model, stored, config), room)


def _distil(model: ModelConfig, stored: Stored, config: DistilConfig, room: int | None) -> Verdict:
    return judge_distilling(planned(config, model, stored), room)


def _qat(model: ModelConfig, stored: Stored, config: QatConfig, room: int | None) -> Verdict:
    return judge_qat(model, config, config.compression.formats, room)


def _prune(model: ModelConfig, stored: Stored, config: PruneConfig, room: int | None) -> Verdict:
    return judge_pruning(model, config, room)


FORECASTS: Mapping[str, Callable[[ModelConfig, Stored, Any, int | None], Verdict]] = {
    "round": _round,
    "gptq": _calibrated,
    "awq": _calibrated,
    "smooth": _calibrated,
    "static": _calibrated,
    "budget": judge_budget,
    "prune": _prune,
    "distil": _distil,
    "qat": _qat,
}
"""Of model, weights as stored, the step's config, and the room there is (None: what is free here)."""


def step_config(table: Table) -> Any:
    """The config of the one step that this table describes, as `compress` in a recipe has it. ConfigError for anything else."""
    step = table.get("step", "round")
    if step not in STEPS:
        raise ConfigError(f'"compress.step": one of {", ".join(STEPS)} (got {step!r}); of several steps check one after another')
    return load(STEPS[step].config, table, "compress")


def made_of(config: Any, stored: Stored) -> str:
    """The format that most layers come to have, as model.memory names it."""
    match config:
        case Rounding():
            return in_memory(config.whole)
        case QatConfig():
            return config.compression.whole
        case BudgetStepConfig():
            return config.formats[0]
        case _:
            return stored.format
