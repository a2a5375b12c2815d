"""The fine-tuning stage: a dense checkpoint, from here or from Hugging Face, trained further on tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt

from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.folder import load_config
from lineshaft.model.grow import add_experts
from lineshaft.text import contract
from lineshaft.train.stage import FitConfig, check_context, check_dense, check_room, check_tokenizer, fit, settled


class FinetuneConfig(FitConfig):
    """Training further. Lower loop.optimiser.peak_lr than for fresh weights: a tenth is usual."""

    active_experts: PositiveInt | None = None
    """Experts a token uses from now on; by default as many as before."""
    added_experts: int = Field(0, ge=0)
    """Experts to add to each layer that has some. They begin with a gate of zero, so the model begins unchanged."""


def _settle(config: FinetuneConfig, parents: Mapping[str, Artifact]) -> FinetuneConfig:
    check_tokenizer("finetune", parents["checkpoint"], parents["tokens"])
    check_context("finetune", config, load_config(parents["checkpoint"].root))
    return settled(config)


def _build(draft: Draft, config: FinetuneConfig) -> None:
    checkpoint = draft.parents["checkpoint"]
    contract.check_folder(checkpoint.root)
    check_room(load_config(checkpoint.root), config)
    model = load_checkpoint(checkpoint.root, dtype=torch.float32, active_experts=config.active_experts)
    check_dense("finetune", model, checkpoint, "train the dense checkpoint and compress the result")
    if config.added_experts:
        add_experts(model, config.added_experts, config.seed)
    fit(draft, model.requires_grad_(True), checkpoint, config)


FINETUNE = Stage(
    name="finetune",
    kind="checkpoint",
    version=1,
    config=FinetuneConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
