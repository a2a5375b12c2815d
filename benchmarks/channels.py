"""Do scores by channel and by head rank units as their removal does? Not speed: rank correlations on tiny trained models.

    .venv/bin/python benchmarks/channels.py --store FOLDER [--channels 100] [--rows 64] [--documents 64]

Truth: a unit alone is taken out, and next-token chances and loss on held-out text are held against the whole model's. Scores are made of
`rows` rows of training text. Spearman's correlation over units, with the 95 % interval of a bootstrap over units. The second model has
heads that share no keys, for there are only six key-value heads in the first (fidelity_models.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fidelity_models import Trained, trained
from scipy.stats import spearmanr
from torch import Tensor

from lineshaft.base.machine import machine
from lineshaft.base.store import Store
from lineshaft.compress.prune import evenly, squared_gradients, worth
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.units import Kind, Units
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import IGNORE, Batch, RowReader, ShuffledRows
from lineshaft.train.objective import Loss, NextToken

ROW_TOKENS = 256
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, 8 heads": {"attention": {"kind": "gqa", "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}},
}
Scores = Mapping[str, Tensor]
"""By block of units, [U]."""


class Drawn:
    """Cross-entropy of tokens that the model draws itself: its squared gradient is the Fisher information (compress/estimates.py)."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        hidden_TI = model.hidden(batch.tokens_T, batch.positions_T, PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row))
        logits_RV = model.logits(hidden_TI[batch.targets_T != IGNORE])
        drawn_R = torch.multinomial(F.softmax(logits_RV.detach(), -1), 1, generator=self.generator)[:, 0]
        total = F.cross_entropy(logits_RV, drawn_R, reduction="sum")
        return Loss(total, total.detach())


def scores(model: Decoder, blocks: list[Units], rows: list[Batch]) -> dict[str, Scores]:
    """What each measure says of each unit."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def sums(fisher: Mapping[str, Tensor]) -> Scores:
        return {units.name: worth(units, weights, fisher) for units in blocks}

    steep, far = sums_of_gradients(model, blocks, rows, weights)
    return {
        "fisher": sums(squared_gradients(model, rows, Drawn())),
        "taylor (prune)": sums(squared_gradients(model, rows, NextToken())),
        "gradient norm": {name: (steep[name] * far[name]).sqrt() for name in steep},
        "magnitude": sums(evenly(model)),
    }


def sums_of_gradients(model: Decoder, blocks: list[Units], rows: list[Batch], weights: Mapping[str, Tensor]) -> tuple[Scores, Scores]:
    """By unit the squared norms of the gradient of the summed loss, and of the weights."""
    model.requires_grad_(True)
    for batch in rows:
        NextToken()(model, batch).total.backward()
    squares = {name: parameter.grad.square() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    steep = {units.name: worth(units, ones, squares) for units in blocks}
    return steep, {units.name: worth(units, weights, ones) for units in blocks}


@contextmanager
def taken_out(model: Decoder, units: Units, unit: int) -> Iterator[None]:
    """What reads the unit reads zeros: the model is then the one without it."""
    state, kept = model.state_dict(), []
    try:
        for place in units.readers:
            own = state[place.tensor].movedim(place.axis, 0).unflatten(0, (units.count, -1))[unit]
            kept.append((own, own.clone()))
            own.zero_()
        yield
    finally:
        for own, before in kept:
            own.copy_(before)


@torch.inference_mode()
def chances(model: Decoder, texts: Tensor) -> Tensor:
    """Log-chances [T, vocabulary] of equally long texts [D, L]."""
    count, length = texts.shape
    attend = PackedCausal(torch.arange(0, count * length, length), count * length, length)
    return F.log_softmax(model(texts.flatten(), torch.arange(length).repeat(count), attend).double(), -1)


def damage(model: Decoder, texts: Tensor, chosen: list[tuple[Units, int]]) -> dict[str, list[float]]:
    """Of each unit's removal: divergence of next-token chances, and rise of the loss, nats a token."""
    batches = texts.split(16)
    before = [chances(model, batch) for batch in batches]
    found: dict[str, list[float]] = {"divergence": [], "loss": []}
    for units, unit in chosen:
        nats, rise = 0.0, 0.0
        with taken_out(model, units, unit):
            for batch, old in zip(batches, before, strict=True):
                new = chances(model, batch)
                nats += float(F.kl_div(new, old, reduction="sum", log_target=True))
                rise += float(loss_of(new, batch) - loss_of(old, batch))
        found["divergence"].append(nats / texts.numel())
        found["loss"].append(rise / texts.numel())
    return found


def loss_of(table: Tensor, texts: Tensor) -> Tensor:
    """Summed over the tokens that have a next one."""
    return F.nll_loss(table.view(*texts.shape, -1)[:, :-1].flatten(0, 1), texts[:, 1:].flatten(), reduction="sum")


def correlation(one: list[float], other: list[float]) -> str:
    """Spearman's, with its interval."""
    pairs, random = np.array([one, other]), np.random.default_rng(0)
    drawn = [pairs[:, random.integers(0, len(one), len(one))] for _ in range(2000)]
    low, high = np.nanquantile([spearmanr(*sample).statistic for sample in drawn], [0.025, 0.975])
    return f"{spearmanr(*pairs).statistic:.3f} ({low:.3f} to {high:.3f})"


def report(name: str, made: Trained, given: argparse.Namespace) -> None:
    """A line for each kind of unit and measure."""
    model = load_checkpoint(made.checkpoint.root).float()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # mapped from disk until now
    texts = torch.tensor(made.beginnings(given.documents, 192))
    reader = ShuffledRows(RowReader(TokenStream(made.tokens, "train"), ROW_TOKENS), 1, 1)
    said = scores(model, model.units(), [reader[number] for number in range(given.rows)])
    kinds: tuple[Kind, ...] = ("channels", "heads")
    for kind in kinds:
        blocks = [units for units in model.units() if units.kind == kind]
        every = [(units, unit) for units in blocks for unit in range(units.count)]
        places = np.random.default_rng(0).permutation(len(every))[: given.channels]
        chosen = [every[place] for place in places]
        truth = damage(model, texts, chosen)
        for measure, by_block in said.items():
            guess = [float(by_block[units.name][unit]) for units, unit in chosen]
            told = ", ".join(f"{what} {correlation(guess, numbers)}" for what, numbers in truth.items())
            print(f"{name}: {len(chosen)} of {len(every)} {kind}, {measure}: rank correlation with {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=100, help="units of a kind that are taken out, one at a time, at random")
    parser.add_argument("--rows", type=int, default=64, help="of 256 tokens that scores are made of")
    parser.add_argument("--documents", type=int, default=64, help="whose first 192 tokens damage is measured on")
    given = parser.parse_args()
    print(f"# {json.dumps(machine())}")
    for name, changes in SHAPES.items():
        report(name, trained(Store(given.store), "llama", **changes), given)


if __name__ == "__main__":
    main()
