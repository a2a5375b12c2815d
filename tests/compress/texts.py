"""Calibration text for tests, and what a model says of it when asked document by document."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import IGNORE, Batch

Documents = list[list[int]]


def documents(seed: int, lengths: Sequence[int], vocabulary: int) -> Documents:
    luck = random.Random(seed)
    return [[luck.randrange(vocabulary) for _ in range(length)] for length in lengths]


def batch(texts: Documents) -> Batch:
    """The documents in one row; the last token of each predicts nothing."""
    lengths = [len(text) for text in texts]
    targets = [target for text in texts for target in (*text[1:], IGNORE)]
    starts = np.cumsum([0, *lengths[:-1]])
    positions = [place for length in lengths for place in range(length)]
    return Batch(
        *(torch.tensor(row) for row in (list(chain.from_iterable(texts)), positions, targets)), torch.tensor(starts), row=sum(lengths)
    )


def logits_of_each(model: Decoder, texts: Documents) -> Tensor:
    """[all tokens but each document's last, vocabulary], float64."""
    rows = []
    with torch.no_grad():
        for text in texts:
            whole = model(torch.tensor(text), torch.arange(len(text)), PackedCausal([0], len(text)))
            rows.append(whole[:-1].double())
    return torch.cat(rows)


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean Kullback-Leibler of two tables of float64 logits, by numpy."""
    p, q = (np.exp(table.numpy()) / np.exp(table.numpy()).sum(1, keepdims=True) for table in (before, after))
    return float((p * (np.log(p) - np.log(q))).sum(1).mean())
