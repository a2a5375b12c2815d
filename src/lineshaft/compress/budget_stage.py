"""Rounding under a budget: the formats of layers are found by how much each hurts (plan.py), then weights are rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import PositiveFloat

from lineshaft.base.config import load
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import say
from lineshaft.compress.budget_preflight import judge_budget
from lineshaft.compress.config import NAMED, CompressConfig
from lineshaft.compress.plan import BudgetConfig, calibration, plan
from lineshaft.compress.proof import Tolerance, remember
from lineshaft.compress.stage import compress, finish, formats_of
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.folder import load_config
from lineshaft.model.memory import stored_in
from lineshaft.text import contract
from lineshaft.train.stage import check_tokenizer

PLAN_FILE = "plan.json"
"""Of each unit its format, bytes and damage."""


class BudgetStepConfig(BudgetConfig):
    """Bits where they do most good, for a size that is given."""

    model_config = NAMED
    step: Literal["budget"] = "budget"
    proof_nats: PositiveFloat | None = None
    """As for rounding: nats a token by which next-token chances on a golden text may differ from the source's."""


def _settle(config: BudgetStepConfig, parents: Mapping[str, Artifact]) -> BudgetStepConfig:
    check_tokenizer("budget", parents["checkpoint"], parents["tokens"])
    return config


def _build(draft: Draft, config: BudgetStepConfig) -> None:
    source = draft.parents["checkpoint"]
    contract.check_folder(source.root)
    judge_budget(load_config(source.root), stored_in(source.root), config).enforce()
    model = load_checkpoint(source.root)
    before = remember(model, source.root)
    found = plan(model, calibration(draft.parents["tokens"], config), config)
    say(f"budget: {found.bits:.3f} bits a weight of {config.bits:g}, forecast {found.damage:.3g} nats a token")
    rounding = load(CompressConfig, {"policy": found.policy, "skip": config.skip, "proof_nats": config.proof_nats})
    layers = compress(model, rounding)
    finish(draft, model, before, Tolerance(rounding.tolerated_nats))
    (draft.root / PLAN_FILE).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    draft.facts |= {"format": formats_of(model), "layers": len(layers), "bits_planned": found.bits, "damage_forecast": found.damage}


BUDGET = Stage(
    name="budget",
    kind="checkpoint",
    version=1,
    config=BudgetStepConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
