"""What training with rounded weights gives back of what 4 bits cost, beside the same model trained as long and rounded then.

    .venv/bin/python benchmarks/qat.py --store FOLDER [--models llama ...] [--forms int4 ...] [--steps 240] [--seeds 2 3 4] [--json FILE]

The models are those of fidelity_models.py, trained STEPS steps. Each is trained further for `--steps` steps, once dense (the control)
and once with rounded weights, on the same batches at the same rates. Loss: nats a token on every held-out row. Recovered: of what
rounding to nearest costs the control, the share that is not there after QAT, with the 95 % interval of a bootstrap over rows.
Seeds decide the order of the text that is trained further on; losses are means over them, and a row's amounts are added up. The output
projection stays dense. The store keeps what was made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from fidelity_models import SHAPES, STEPS, Trained, trained

from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress import qat
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.qat_stage import QAT, QatConfig
from lineshaft.compress.stage import COMPRESS
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import IGNORE, RowReader
from lineshaft.train.finetune import FINETUNE, FinetuneConfig
from lineshaft.train.loop import LoopConfig
from lineshaft.train.optimiser import OptimiserConfig

FORMS: dict[str, dict[str, Any]] = {
    "int4": {"format": "int4"},
    "int4-128": {"format": "int4", "group": 128},
    "int4-32-zeros": {"format": "int4", "group": 32, "symmetric": False},
    "int4-a8": {"format": "int4", "activations": "int8"},
}
ROW = 256
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Sums over the targets of each held-out row."""

    nats: Numbers
    targets: Numbers

    def __add__(self, other: Scored) -> Scored:
        return Scored(self.nats + other.nats, self.targets + other.targets)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.targets.sum())


@torch.inference_mode()
def scored(model: Decoder, reader: RowReader) -> Scored:
    nats, targets = [], []
    for first in range(0, reader.rows, 8):
        batch = reader.batch(np.arange(first, min(first + 8, reader.rows)))
        logits_TV = model(batch.tokens_T, batch.positions_T, PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row))
        nats_T = F.cross_entropy(logits_TV.float(), batch.targets_T, ignore_index=IGNORE, reduction="none")
        nats += nats_T.view(-1, batch.row).double().sum(1).tolist()
        targets += (batch.targets_T != IGNORE).view(-1, batch.row).sum(1).tolist()
    return Scored(np.array(nats), np.array(targets, np.float64))


@dataclass(frozen=True)
class Result:
    """Losses of one model in one form, nats a token."""

    source: float
    source_rounded: float
    source_clipped: float
    """Ranges as QAT begins with, nothing trained."""
    further: float
    further_rounded: float
    qat: float
    recovered: float
    low: float
    high: float

    def __str__(self) -> str:
        shown = (f"{value:.4f}" for value in (self.source, self.source_rounded, self.source_clipped, self.further, self.further_rounded))
        cost, left = (100 * (loss / self.further - 1) for loss in (self.further_rounded, self.qat))
        share = f"{100 * self.recovered:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"
        return f"{' | '.join(shown)} | {self.qat:.4f} | +{cost:.3f} % | {left:+.3f} % | {share}"


HEAD = "source | rounded | clipped | further | further, rounded | QAT | rounding costs | QAT costs | recovered"


def recovered(further: Scored, rounded: Scored, ours: Scored) -> tuple[float, float, float]:
    """The share, and its 95 % interval."""
    luck, rows = np.random.default_rng(1), len(further.nats)
    picks = luck.integers(0, rows, (2000, rows))
    cost, left = ((item.nats - further.nats)[picks].sum(1) for item in (rounded, ours))
    shares = 1 - left / cost
    whole = 1 - (ours.loss - further.loss) / (rounded.loss - further.loss)
    return whole, float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def measured(store: Store, model: Trained, form: dict[str, Any], steps: int, seeds: list[int]) -> Result:
    compression, reader = CompressConfig.model_validate(form), RowReader(TokenStream(model.tokens, "heldout"), ROW)

    def of(made: Artifact) -> Scored:
        return scored(load_checkpoint(made.root), reader)

    control, rounded, ours = [], [], []
    for seed in seeds:
        further, aware = made_further(store, model, form, steps, seed)
        control.append(of(further))
        rounded.append(of(COMPRESS(store, compression, checkpoint=further)))
        ours.append(of(aware))
    clipped = load_checkpoint(model.checkpoint.root)
    qat.begin(clipped, compression)
    source, source_rounded = of(model.checkpoint), of(COMPRESS(store, compression, checkpoint=model.checkpoint))
    summed = [reduce(add, scores) for scores in (control, rounded, ours)]
    losses = (source.loss, source_rounded.loss, scored(clipped, reader).loss, *(score.loss for score in summed))
    return Result(*losses, *recovered(*summed))


def made_further(store: Store, model: Trained, form: dict[str, Any], steps: int, seed: int) -> tuple[Artifact, Artifact]:
    """The model trained further, dense and with rounded weights."""
    loop = LoopConfig(steps=steps, precision="float32", save_every=60, log_every=20, optimiser=OptimiserConfig(peak_lr=1e-3))
    budget = {"seed": seed, "sequence_tokens": ROW, "rows": 4, "loop": loop}
    parents = {"checkpoint": model.checkpoint, "tokens": model.tokens}
    further = FINETUNE(store, FinetuneConfig.model_validate(budget), **parents)
    return further, QAT(store, QatConfig.model_validate(budget | form), **parents)


def results(store: Store, models: list[str], forms: list[str], steps: int, seeds: list[int]) -> Iterator[tuple[str, str, Result]]:
    for family in models:
        model = trained(store, family)
        for form in forms:
            yield family, form, measured(store, model, FORMS[form], steps, seeds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama", "qwen3_moe"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["int4"])
    parser.add_argument("--steps", type=int, default=STEPS // 5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    print(f"{json.dumps(machine())}\n{STEPS} steps, then {given.steps} more, seeds {given.seeds}; nats a token", flush=True)
    print(f"| model, form | {HEAD} |", flush=True)
    told = []
    for family, form, result in results(Store(given.store), given.models, given.forms, given.steps, given.seeds):
        print(f"| {family}, {form} | {result} |", flush=True)
        told.append({"model": family, "form": form, **asdict(result)})
    if given.json:
        about = {"machine": machine(), "steps": [STEPS, given.steps], "seeds": given.seeds}
        given.json.write_text(json.dumps(about | {"results": told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
