"""What calibrated rounding costs trained models beside rounding to nearest: the rise of the held-out loss.

    .venv/bin/python benchmarks/calibrated.py --store FOLDER [--models llama ...] [--steps round awq ...] [--group 128] [--json FILE]

The models are those of fidelity_models.py. INT4, output projection dense, 64 calibration rows of 512 tokens. Loss: nats a token on the
held-out rows; its rise over the dense model's in percent, and the difference from rounding's, each with the 95 % interval of a
bootstrap over rows, which all are scored by the same. The store keeps what was made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_models import SHAPES, trained
from qat import ROW, Scored, scored

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.steps import STEPS
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import RowReader


@dataclass(frozen=True)
class Difference:
    """A loss beside another one, in percent of the source's."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} % ({self.low:+.3f} to {self.high:+.3f})"


def difference(ours: Scored, theirs: Scored, source: Scored) -> Difference:
    """`ours` less `theirs`, and its 95 % interval: rows are drawn anew, the same for all three."""
    picks = np.random.default_rng(1).integers(0, len(source.nats), (2000, len(source.nats)))
    apart = ours.nats - theirs.nats
    drawn = apart[picks].sum(1) / source.nats[picks].sum(1)
    return Difference(*(100 * float(value) for value in (apart.sum() / source.nats.sum(), *np.quantile(drawn, (0.025, 0.975)))))


def made(store: Store, step: str, config: dict[str, Any], parents: dict[str, Artifact]) -> Artifact:
    stage = STEPS[step]
    return stage(store, load(stage.config, config), **{role: parents[role] for role in stage.parents})


def measured(store: Store, family: str, steps: list[str], config: dict[str, Any]) -> Iterator[tuple[str, float, Difference, Difference]]:
    """Of each step its name, loss, rise, and what lies between it and rounding."""
    model = trained(store, family)
    parents = {"checkpoint": model.checkpoint, "tokens": model.tokens}
    reader = RowReader(TokenStream(model.tokens, "heldout"), ROW)

    def of(artifact: Artifact) -> Scored:
        return scored(load_checkpoint(artifact.root), reader)

    source, rounded = of(model.checkpoint), of(made(store, "round", config, parents))
    for step in steps:
        found = rounded if step == "round" else of(made(store, step, config, parents))
        yield step, found.loss, difference(found, source, source), difference(found, rounded, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", nargs="+", choices=("round", "gptq", "awq"), default=["round", "gptq", "awq"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    told: list[dict[str, Any]] = []
    for family in args.models:
        for step, loss, rise, beside in measured(Store(args.store), family, args.steps, {"format": "int4", "group": args.group}):
            print(f"{family}, int4-{args.group}, {step}: loss {loss:.4f}, rise {rise}, beside rounding {beside}", flush=True)
            told.append({"model": family, "step": step, "loss": loss, "rise": asdict(rise), "beside_round": asdict(beside)})
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "results": told}, indent=2))


if __name__ == "__main__":
    main()
