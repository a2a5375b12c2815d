"""The training stage: tokens to a checkpoint, from fresh weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import Architecture, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE
from lineshaft.records.tokens import TokenStream
from lineshaft.text import contract
from lineshaft.train import loop
from lineshaft.train.batches import RowReader, ShuffledRows
from lineshaft.train.loop import LoopConfig, Trained
from lineshaft.train.objective import NextToken, Objective
from lineshaft.train.preflight import Training, judge_training

HISTORY_FILE = "history.jsonl"
F = TypeVar("F", bound="FitConfig")

SMALL_DEEPSEEK = Architecture(
    family="deepseek_v3",
    hidden_size=256,
    num_hidden_layers=4,
    intermediate_size=512,
    max_position_embeddings=1024,
    attention=LatentAttention(num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48),
    moe=MixtureOfExperts(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, first_k_dense_replace=1),
)
"""A DeepSeek-V3 shape that two cores train in minutes."""


class FitConfig(Config):
    """What every training run needs to know besides its model."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Decides fresh weights and the order of the text."""
    sequence_tokens: PositiveInt = 256
    """Tokens in a row; documents are packed into rows and never see each other."""
    rows: PositiveInt = 8
    """Rows in a batch."""
    further_weight: float = Field(0.3, ge=0)
    """What the loss of multi-token-prediction layers counts for beside that of the next token; only for models that have some."""
    loop: LoopConfig = LoopConfig()


class TrainConfig(FitConfig):
    """Pre-training from fresh weights."""

    model: Architecture = SMALL_DEEPSEEK
    """Shape of the model; the vocabulary comes from the tokenizer."""


def _settle(config: TrainConfig, parents: Mapping[str, Artifact]) -> TrainConfig:
    tokens, tokenizer = parents["tokens"], parents["tokenizer"]
    if tokens.manifest.parents["tokenizer"] != tokenizer.id:
        raise ConfigError(f"train: {tokens.id} was made with {tokens.manifest.parents['tokenizer']}, not with {tokenizer.id}")
    check_context("train", config, config.model)
    return settled(config)


def check_context(name: str, config: FitConfig, model: Architecture) -> None:
    """Raises ConfigError when rows are longer than the model's context."""
    if config.sequence_tokens > (most := model.max_position_embeddings):
        asked = f"{name}: sequence_tokens {config.sequence_tokens}"
        raise ConfigError(f"{asked} exceeds the model's max_position_embeddings {most}: change one")


def check_tokenizer(name: str, checkpoint: Artifact, tokens: Artifact) -> None:
    """Raises ConfigError when the tokens were made with another tokenizer than the checkpoint's."""
    tokenizer = hashlib.sha256(checkpoint.path("tokenizer.json").read_bytes()).hexdigest()
    if tokens.manifest.facts["tokenizer_sha256"] != tokenizer:
        raise ConfigError(f"{name}: {tokens.id} was made with another tokenizer than {checkpoint.id} carries")


def check_dense(name: str, model: Decoder, checkpoint: Artifact, told: str) -> None:
    """Raises ConfigError, which ends with what to do (`told`), when the model in a checkpoint is compressed."""
    compressed = [layer for layer, linear in model.linears().items() if linear.format != DENSE]
    if compressed:
        raise ConfigError(f"{name}: {checkpoint.id} is compressed ({compressed[0]} and {len(compressed) - 1} more layers): {told}")


def check_room(model: ModelConfig, config: FitConfig) -> None:
    """Raises DoesNotFit when training would need more memory than there is, before there are weights."""
    judge_training(Training(model, config.rows, config.sequence_tokens, config.loop.accumulate, config.loop.precision)).enforce()


def settled(config: F) -> F:
    """The config with the precision that `auto` means here."""
    if config.loop.precision != "auto":
        return config
    return config.model_copy(update={"loop": config.loop.model_copy(update={"precision": loop.AUTO})})


def _build(draft: Draft, config: TrainConfig) -> None:
    tokens, tokenizer = draft.parents["tokens"], draft.parents["tokenizer"]
    contract.check_folder(tokenizer.root)
    facts = tokens.manifest.facts
    vocabulary = {"vocab_size": facts["vocab_size"], "bos_token_id": facts["bos_id"], "eos_token_ids": [facts["eos_id"]]}
    model_config = ModelConfig.model_validate(config.model.model_dump() | vocabulary)
    check_room(model_config, config)
    model = Decoder(model_config)
    model.initialise(config.seed)
    fit(draft, model, tokenizer, config)


def fit(draft: Draft, model: Decoder, tokenizer: Artifact, config: FitConfig) -> None:
    """Train the model on the draft's parent `tokens`; write checkpoint, loss history and facts. `tokenizer` holds the tokenizer's files."""
    keep(draft, model, tokenizer, train(draft, model, config, NextToken(config.further_weight)))


def train(draft: Draft, model: Decoder, config: FitConfig, objective: Objective) -> Trained:
    """Train the model in place on the draft's parent `tokens`; states go to the draft's scratch folder."""
    stream = TokenStream(draft.parents["tokens"], "train")
    batches = ShuffledRows(RowReader(stream, config.sequence_tokens), config.rows, config.seed)
    return loop.run(model, batches, objective, config.loop, draft.scratch)


def keep(draft: Draft, model: Decoder, tokenizer: Artifact, trained: Trained) -> None:
    """Write a trained model's checkpoint, loss history and facts."""
    save_checkpoint(model, draft.root, tokenizer.root)
    draft.facts |= contract.carried(tokenizer, draft.root) | {"format": "dense"}
    note(draft, model, trained)


def note(draft: Draft, model: Decoder, trained: Trained) -> None:
    """Write loss history and the facts of training, but no checkpoint."""
    write_history(draft.root, trained.history)
    cost, read = cost_of(model.config), draft.parents["tokens"].manifest.facts["train"]["tokens"]
    draft.facts |= {"parameters": cost.parameters, "active_parameters": cost.active_parameters}
    draft.facts |= {"tokens": trained.tokens, "epochs": trained.tokens / read}
    draft.facts["final_loss"] = trained.history[-1]["loss"]
    draft.aside |= {"train_seconds": trained.seconds, "threads": torch.get_num_threads()}
    if trained.fresh_tokens:
        draft.aside["tokens_per_second"] = trained.fresh_tokens / trained.seconds


def write_history(folder: Path, history: list[dict[str, float]]) -> None:
    """The loss curve, an entry a line."""
    (folder / HISTORY_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in history))


PRETRAIN = Stage(
    name="train",
    kind="checkpoint",
    version=2,
    config=TrainConfig,
    build=_build,
    parents={"tokens": "tokens", "tokenizer": "tokenizer"},
    settle=_settle,
)
