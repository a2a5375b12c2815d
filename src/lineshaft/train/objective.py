"""What a training run minimises. One loop, many objectives."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import IGNORE, Batch


class Objective(Protocol):
    """From a model and a batch to a loss."""

    def __call__(self, model: Decoder, batch: Batch) -> Tensor:
        """The loss summed over the batch's targets, in nats, as a float32 scalar to differentiate."""


class NextToken:
    """Cross-entropy of the next token."""

    def __call__(self, model: Decoder, batch: Batch) -> Tensor:
        """See Objective."""
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        logits_TV = model(batch.tokens_T, batch.positions_T, attend)
        return F.cross_entropy(logits_TV.float(), batch.targets_T, ignore_index=IGNORE, reduction="sum")
