"""The text that a model is calibrated on: rows of the training split, chosen by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.base.store import Artifact
from lineshaft.base.terminal import say
from lineshaft.compress.calibrate.config import CalibrationConfig
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.rope import Rotation, rotation
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import IGNORE, Batch, RowReader, ShuffledRows

ROWS_AT_ONCE = 4
TOKENS_AT_ONCE = 1024
"""Of so many at most, but at least one row: a wide block makes some 100 bytes a channel and token on its way."""


@dataclass(frozen=True)
class Surroundings:
    """A batch as the layers of a model see it."""

    batch: Batch
    rotate: Rotation
    attend: PackedCausal

    @property
    def next_T(self) -> Tensor:
        """The token after each; itself where a document ends, where nothing is predicted."""
        return torch.where(self.batch.targets_T == IGNORE, self.batch.tokens_T, self.batch.targets_T)


def rows_at_once(row_tokens: int) -> int:
    """Rows of a batch, of so many tokens each."""
    return max(min(TOKENS_AT_ONCE // row_tokens, ROWS_AT_ONCE), 1)


def calibration_rows(tokens: Artifact, config: CalibrationConfig, model: ModelConfig) -> list[Surroundings]:
    """Batches of rows, ROWS_AT_ONCE and TOKENS_AT_ONCE at most. Raises TrainingError where the text has not even one row."""
    reader = RowReader(TokenStream(tokens, "train"), config.sequence_tokens)
    count = min(config.sequences, reader.rows)
    if count < config.sequences:
        told = f"{tokens.id} has {count} rows of {config.sequence_tokens} tokens, {config.sequences} were asked for"
        say(f"calibration: {told}: all are used")
    chosen = ShuffledRows(reader, 1, config.seed).rows(0, count)
    at_once = rows_at_once(config.sequence_tokens)
    batches = (reader.batch(chosen[first : first + at_once]) for first in range(0, count, at_once))
    return [surrounded(batch, model) for batch in batches]


def surrounded(batch: Batch, model: ModelConfig) -> Surroundings:
    """The batch as the layers of such a model see it."""
    attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
    return Surroundings(batch, rotation(model, batch.positions_T), attend)
