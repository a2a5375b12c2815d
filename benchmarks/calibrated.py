"""What calibrated rounding costs trained models beside rounding to nearest: the rise of the held-out loss.

    .venv/bin/python benchmarks/calibrated.py --store FOLDER [--models llama ...] [--steps round awq ...] [--peer PYTHON] [--json FILE]

The models are those of fidelity_models.py. INT4, output projection dense, 64 calibration rows of 512 tokens. Loss: nats a token on the
held-out rows; its rise over the dense model's in percent, and the difference from rounding's, each with the 95 % interval of a
bootstrap over rows, which all are scored by the same. Divergence: of next-token chances from the dense model's (Kullback-Leibler), in
thousandths of a nat a token; a model that is not trained to the end can gain by luck what rounding costs, a divergence can't. The store
keeps what was made. `--peer`: a Python in which llmcompressor is installed (calibration_peer.py says how); its AWQ of the same models on
the same rows is scored as well, read back from the folder that it wrote. It has groups of 128 only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from calibration_peer import rows_of, timed
from fidelity_models import SHAPES, Trained, trained
from qat import ROW, Scored, scored

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.steps import STEPS
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
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


@torch.inference_mode()
def divergence(model: Decoder, source: Decoder, reader: RowReader) -> float:
    """Of the next token's chances on every token of the held-out rows, nats a token."""
    total = tokens = 0.0
    for first in range(0, reader.rows, 8):
        batch = reader.batch(np.arange(first, min(first + 8, reader.rows)))
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        ours_TV, theirs_TV = (item(batch.tokens_T, batch.positions_T, attend).float().log_softmax(-1) for item in (model, source))
        total += float(F.kl_div(ours_TV, theirs_TV, reduction="sum", log_target=True))
        tokens += len(batch.tokens_T)
    return total / tokens


def made(store: Store, step: str, config: dict[str, Any], parents: dict[str, Artifact]) -> Artifact:
    stage = STEPS[step]
    known = {name: value for name, value in config.items() if name in stage.config.model_fields}  # rounding has no rows
    return stage(store, load(stage.config, known), **{role: parents[role] for role in stage.parents})


@dataclass(frozen=True)
class Result:
    """A step's model beside the dense one."""

    step: str
    loss: float
    """Nats a token."""
    rise: Difference
    beside_round: Difference
    divergence: float
    """Nats a token."""

    def __str__(self) -> str:
        told = f"{self.step}: loss {self.loss:.4f}, rise {self.rise}, beside rounding {self.beside_round}"
        return f"{told}, divergence {1000 * self.divergence:.2f}"


def made_by_peer(python: str, model: Trained, config: dict[str, Any]) -> Decoder:
    """llm-compressor's AWQ of the same checkpoint and rows, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        rows.write_text(json.dumps(rows_of(model.tokens, model.checkpoint, {"seed": config["seed"]})))
        options = {"threads": torch.get_num_threads(), "dtype": "float32", "folder": str(model.checkpoint.root), "rows": str(rows)}
        timed(python, "llmcompressor", options | {"out": str(Path(folder, "out"))})
        return load_checkpoint(Path(folder, "out"))  # mapped, so it outlives its files


def compressed(store: Store, model: Trained, steps: list[str], config: dict[str, Any], peer: str | None) -> Iterator[tuple[str, Decoder]]:
    """What each step makes of the model, and what llm-compressor does."""
    parents = {"checkpoint": model.checkpoint, "tokens": model.tokens}
    for step in steps:
        yield step, load_checkpoint(made(store, step, config, parents).root)
    if peer is not None:
        yield "awq by llm-compressor", made_by_peer(peer, model, config)


def measured(store: Store, family: str, steps: list[str], config: dict[str, Any], peer: str | None) -> Iterator[Result]:
    """Every step on the model of this family."""
    model = trained(store, family)
    reader = RowReader(TokenStream(model.tokens, "heldout"), ROW)
    rounding = made(store, "round", config, {"checkpoint": model.checkpoint})
    dense, plain = load_checkpoint(model.checkpoint.root), load_checkpoint(rounding.root)
    source, rounded = scored(dense, reader), scored(plain, reader)
    for step, ours in compressed(store, model, steps, config, peer):
        losses = scored(ours, reader)
        apart = difference(losses, source, source), difference(losses, rounded, source)
        yield Result(step, losses.loss, *apart, divergence(ours, dense, reader))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", nargs="+", choices=("round", "gptq", "awq"), default=["round", "gptq", "awq"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="chooses the calibration rows")
    parser.add_argument("--peer", help="a Python in which llmcompressor is installed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peer and args.group != 128:
        parser.error("--peer has groups of 128 only")
    print(json.dumps(machine()), flush=True)
    told: list[dict[str, Any]] = []
    for family in args.models:
        config = {"format": "int4", "group": args.group, "seed": args.seed}
        for found in measured(Store(args.store), family, args.steps, config, args.peer):
            print(f"{family}, int4-{args.group}, {found}", flush=True)
            told.append({"model": family} | asdict(found))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "results": told}, indent=2))


if __name__ == "__main__":
    main()
