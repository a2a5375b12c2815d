"""Quality on held-out text: loss, bits per byte, next-token accuracy, for a model and for the bigram baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
    by_document: dict[int, list[float]] = field(default_factory=dict)
    """Document to its own [nats, tokens, correct]: what two models are compared by."""
    greedy: list[Tensor] = field(default_factory=list)
    """The most likely token at each predicted place, in order; of a model only."""

    def add(self, nats_R: Tensor, correct_R: Tensor, document_R: Tensor) -> None:
        """Count predictions: what each cost, whether the most likely token was it, and the document it belongs to."""
        self.nats += float(nats_R.sum())
        self.correct += int(correct_R.sum())
        self.tokens += len(nats_R)
        parts_R3 = torch.stack([nats_R.double(), torch.ones_like(nats_R, dtype=torch.float64), correct_R.double()], 1)
        numbers, place_R = torch.unique(document_R, return_inverse=True)
        sums_D3 = torch.zeros(len(numbers), 3, dtype=torch.float64).index_add_(0, place_R, parts_R3)
        for number, sums in zip(numbers.tolist(), sums_D3.tolist(), strict=True):
            before = self.by_document.setdefault(number, [0.0, 0.0, 0.0])
            before[:] = [old + new for old, new in zip(before, sums, strict=True)]

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

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """The rows in order, and the document of each token."""
        rows = min(self.reader.rows, max(1, self.max_tokens // self.reader.row))
        with bar("score", rows) as progress:
            for first in range(0, rows, ROWS_AT_ONCE):
                last = min(rows, first + ROWS_AT_ONCE)
                yield self.reader.batch(np.arange(first, last)), self.reader.documents(np.arange(first, last))
                progress.advance(last - first)

    def text_bytes(self, targets: torch.Tensor) -> int:
        """Bytes that these target ids stand for."""
        return int(self._byte_table[targets].sum())


@torch.inference_mode()
def score_model(model: Decoder, text: HeldOut) -> Score:
    """Run the model over the held-out rows, in the precision its weights have, log-probabilities in float32."""
    score = Score()
    for batch, document_T in text.batches():
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        logits_TV = model(batch.tokens_T, batch.positions_T, attend).float()
        counted = batch.targets_T != IGNORE
        targets, logits_RV = batch.targets_T[counted], logits_TV[counted]
        score.greedy.append(logits_RV.argmax(-1))
        score.add(F.cross_entropy(logits_RV, targets, reduction="none"), score.greedy[-1] == targets, document_T[counted])
        score.text_bytes += text.text_bytes(targets)
    return score


def score_bigram(bigram: Bigram, text: HeldOut) -> Score:
    """The same rows and the same targets, predicted from the token before alone."""
    score = Score()
    for batch, _ in text.batches():
        counted = batch.targets_T != IGNORE
        targets = batch.targets_T[counted]
        score.nats -= float(bigram.log_prob(batch.tokens_T[counted].numpy(), targets.numpy()).sum())
        score.tokens += len(targets)
        score.text_bytes += text.text_bytes(targets)
    return score
