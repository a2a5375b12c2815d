"""The stage of quantisation-aware training: a dense checkpoint, trained further while its weights are rounded, to a compressed one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt, model_validator

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import say
from lineshaft.compress import qat
from lineshaft.compress.config import NAMED, CompressConfig
from lineshaft.compress.layers import warn_of_experts
from lineshaft.compress.qat_preflight import judge_qat
from lineshaft.compress.stage import formats_of
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.records.tokens import TokenStream
from lineshaft.text import contract
from lineshaft.train.batches import IGNORE, RowReader
from lineshaft.train.loop import LoopConfig
from lineshaft.train.objective import NextToken
from lineshaft.train.optimiser import OptimiserConfig
from lineshaft.train.stage import FitConfig, check_context, check_tokenizer, note, settled, train

MEASURED_TOKENS = 32_768
"""Held-out tokens on which losses before and after are measured, about."""
_COMPRESSION = ("format", "group", "symmetric", "activations", "skip", "policy")
"""Fields that mean what they mean in CompressConfig."""


class QatConfig(FitConfig):
    """Training with weights rounded to few bits, all alike or by a policy. A tenth or a fifth of the steps of pre-training is usual."""

    model_config = NAMED
    step: Literal["qat"] = "qat"
    format: Literal["int8", "int4"] = "int4"
    """How weights are stored, and rounded in training."""
    group: PositiveInt | None = None
    """Inputs that share a scale; null: one scale a channel."""
    symmetric: bool = True
    """Zero lies in the middle of the codes; false (int4 only): each group has a code of zero of its own, which is learnt as well."""
    activations: Literal["int8"] | None = None
    """int8: products round what meets these weights as well, a scale a token, in training and after it."""
    skip: list[str] = ["lm_head"]
    """Layers left dense, and trained so: names or patterns such as `model.layers.0.*`."""
    policy: dict[str, str] = {}
    """Other formats for some layers: name or pattern to `dense`, `int8`, `int4-128` and the like, as for compress."""
    ranges: Literal["minmax", "percentile", "mse", "entropy", "cut"] = "mse"
    """How ranges begin, from a histogram of each layer's weights; minmax: as rounding to nearest has them. Training moves them."""
    loop: LoopConfig = LoopConfig(optimiser=OptimiserConfig(peak_lr=1e-3))

    @property
    def compression(self) -> CompressConfig:
        """Which layer gets which format."""
        return load(CompressConfig, {name: getattr(self, name) for name in _COMPRESSION})

    @model_validator(mode="after")
    def _supported(self) -> QatConfig:
        try:
            assert self.compression
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


def _settle(config: QatConfig, parents: Mapping[str, Artifact]) -> QatConfig:
    check_tokenizer("qat", parents["checkpoint"], parents["tokens"])
    check_context("qat", config, load_config(parents["checkpoint"].root))
    return settled(config)


def _build(draft: Draft, config: QatConfig) -> None:
    source, heldout = draft.parents["checkpoint"], TokenStream(draft.parents["tokens"], "heldout")
    contract.check_folder(source.root)
    judge_qat(load_config(source.root), config, config.compression.formats).enforce()
    model = load_checkpoint(source.root, dtype=torch.float32)
    if len(heldout) < 2:
        say("qat: the tokens have no held-out text, so losses before and after are not measured")
    losses = {"source": heldout_loss(model, heldout, config)}
    layers = qat.begin(model, config.compression, config.ranges)
    say(f"qat: {len(layers)} linear layers are rounded in training; embeddings, norms, routers and what skip names are not")
    losses["before"] = heldout_loss(model, heldout, config)
    note(draft, model, train(draft, model.requires_grad_(True), config, NextToken(config.further_weight)))
    learnt = qat.finish(model)
    warn_of_experts(model, "qat")
    save_checkpoint(model, draft.root, source.root)
    read = prove_trained(draft.root, model, learnt)
    losses["after"] = heldout_loss(read, heldout, config)
    draft.facts |= contract.carried(source, draft.root) | {"format": formats_of(model), "layers": len(layers)}
    draft.facts |= {f"heldout_loss_{when}": loss for when, loss in losses.items() if loss is not None}
    draft.facts["quantised_share_of_fp32"] = quantised_share_of_fp32(model)


@torch.inference_mode()
def heldout_loss(model: Decoder, stream: TokenStream, config: FitConfig) -> float | None:
    """Nats a token on the first held-out rows, about MEASURED_TOKENS, in batches as training has them; None where there is no text."""
    if len(stream) < 2:
        return None
    reader, total, targets = RowReader(stream, min(config.sequence_tokens, len(stream) - 1)), 0.0, 0
    rows = min(reader.rows, -(-MEASURED_TOKENS // reader.row))
    for first in range(0, rows, config.rows):
        batch = reader.batch(np.arange(first, min(first + config.rows, rows)))
        total += NextToken()(model, batch).next_token.item()
        targets += int((batch.targets_T != IGNORE).sum())
    return total / targets if targets else None


def prove_trained(folder: Path, model: Decoder, learnt: Mapping[str, qat.Learnt]) -> Decoder:
    """What the folder reads back, proved to be what was trained.

    Raises BadCheckpoint unless each compressed layer has the format and the very weights that training multiplied by, worked out once
    more from what it left, and everything else has the bits of `model`, which the folder was written from.
    """
    read = load_checkpoint(folder)
    linears, found = read.linears(), read.state_dict()
    for name, layer in learnt.items():
        if linears[name].format != layer.format.real:
            told = f"reads back as {linears[name].format.describe()}, trained was {layer.format.real.describe()}"
            raise BadCheckpoint(f"{folder}: {name} {told}: the writer is at fault")
        if not torch.equal(linears[name].dense_weight(torch.float32), layer.weight()):
            raise BadCheckpoint(f"{folder}: {name} does not read back as it was trained: the disk, the writer or the encoder is at fault")
    for name, tensor in model.state_dict().items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise BadCheckpoint(f"{folder}: {name} does not read back as it was trained: the disk or the writer is at fault")
    return read


QAT = Stage(
    name="qat",
    kind="checkpoint",
    version=1,
    config=QatConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
