"""Quality on held-out text: loss, bits per byte, next-token accuracy, for a model and for the bigram baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from lineshaft.base.terminal import bar
from lineshaft.evaluate.bigram import Bigram
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import IGNORE, Batch, RowReader

ROWS_AT_ONCE = 8


@dataclass
class Score:
    """Sums over predicted tokens; the end-of-document token counts as a prediction that holds no bytes."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0
    text_bytes: int = 0

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte of text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the most likely one."""
        return self.correct / self.tokens


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, the same for every model and baseline."""

    reader: RowReader
    bytes_of_token: Sequence[int]
    """UTF-8 bytes that each id stands for; 0 for special tokens."""
    max_tokens: int
    """Whole rows are read up to about this many tokens."""

    @cached_property
    def _byte_table(self) -> torch.Tensor:
        return torch.tensor(self.bytes_of_token)

    def batches(self) -> Iterator[Batch]:
        """The rows in order."""
        rows = min(self.reader.rows, max(1, self.max_tokens // self.reader.row))
        with bar("score", rows) as progress:
            for first in range(0, rows, ROWS_AT_ONCE):
                last = min(rows, first + ROWS_AT_ONCE)
                yield self.reader.batch(np.arange(first, last))
                progress.advance(last - first)

    def text_bytes(self, targets: torch.Tensor) -> int:
        """Bytes that these target ids stand for."""
        return int(self._byte_table[targets].sum())


@torch.inference_mode()
def score_model(model: Decoder, text: HeldOut) -> Score:
    """Run the model over the held-out rows, in the precision its weights have, log-probabilities in float32."""
    score = Score()
    for batch in text.batches():
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        logits_TV = model(batch.tokens_T, batch.positions_T, attend).float()
        counted = batch.targets_T != IGNORE
        targets = batch.targets_T[counted]
        score.nats += F.cross_entropy(logits_TV[counted], targets, reduction="sum").item()
        score.correct += int((logits_TV[counted].argmax(-1) == targets).sum())
        score.tokens += len(targets)
        score.text_bytes += text.text_bytes(targets)
    return score


def score_bigram(bigram: Bigram, text: HeldOut) -> Score:
    """The same rows and the same targets, predicted from the token before alone."""
    score = Score()
    for batch in text.batches():
        counted = batch.targets_T != IGNORE
        targets = batch.targets_T[counted]
        score.nats -= float(bigram.log_prob(batch.tokens_T[counted].numpy(), targets.numpy()).sum())
        score.tokens += len(targets)
        score.text_bytes += text.text_bytes(targets)
    return score
