"""What a training run minimises. One loop, many objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import IGNORE, Batch


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's targets, in nats, as float32 scalars."""

    total: Tensor
    """To differentiate."""
    next_token: Tensor
    """To report: the cross-entropy of the next token alone, comparable between runs whatever else they minimise."""


class Objective(Protocol):
    """From a model and a batch to a loss."""

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        """The loss of one batch."""


class NextToken:
    """Cross-entropy of the next token; with prediction layers also of the tokens after it.

    Their mean is added with `further_weight`, lambda of equation 25 (DeepSeek-V3, arXiv 2412.19437, section 2.2).
    """

    def __init__(self, further_weight: float = 0.3) -> None:
        self.further_weight = further_weight

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        """See Objective."""
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        hidden_TI = model.hidden(batch.tokens_T, batch.positions_T, attend)
        main = cross_entropy(model.logits(hidden_TI), batch.targets_T)
        further = self.further(model, batch, hidden_TI, attend)
        return Loss(main if further is None else main + further, main)

    def further(self, model: Decoder, batch: Batch, hidden_TI: Tensor, attend: PackedCausal) -> Tensor | None:
        """What the prediction layers add to the loss, from `Decoder.hidden` of this batch; None where there are none."""
        depths = model.config.num_nextn_predict_layers
        if not depths:
            return None
        further, next_T = torch.zeros(()), batch.targets_T
        for depth in range(depths):
            # The last tokens of a document have no next one: what stands there is seen by nobody and predicts nothing.
            hidden_TI = model.draft(depth, hidden_TI, next_T.clamp(min=0), batch.positions_T, attend)
            next_T = one_further(next_T, batch.positions_T)
            further = further + cross_entropy(model.logits(hidden_TI), next_T)
        return self.further_weight / depths * further


def one_further(targets_T: Tensor, positions_T: Tensor) -> Tensor:
    """The targets one token later in the same document part, or IGNORE where that ends."""
    later_T = torch.full_like(targets_T, IGNORE)
    goes_on = positions_T[1:] == positions_T[:-1] + 1
    later_T[:-1] = torch.where(goes_on, targets_T[1:], IGNORE)
    return later_T


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Nats of these targets, IGNORE left out, summed in float32."""
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=IGNORE, reduction="sum")
