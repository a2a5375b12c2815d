"""What INT8 activations cost a trained tiny model: weights alone, a scale a token, or one scale a layer by each way to choose a range.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/static_int8.py --store FOLDER [--models llama qwen3_moe deepseek_v3]

Rise of the held-out loss against the float32 model, with its 95 % interval over documents (evaluate/statistics.py). `outliers` are the
same model once the outputs of its norms are forty times as large in two channels, which what reads them undoes: the function is the same,
activations are as those of large models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fidelity_models import Trained, trained

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress.ranges import METHODS
from lineshaft.compress.steps import STEPS
from lineshaft.evaluate.quality import HeldOut, Score, score_model
from lineshaft.evaluate.statistics import Interval, compare
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.junction import scale
from lineshaft.model.norm import RmsNorm
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import RowReader

ROW = 256
CHANNELS, TIMES = [1, 7], 40.0
CALIBRATION = {"sequences": 64, "sequence_tokens": ROW, "proof_nats": 100.0}
FORMS: dict[str, list[dict[str, Any]]] = {
    "weights alone": [{"step": "round"}],
    "a scale a token": [{"step": "round", "activations": "int8"}],
    **{f"one scale, {way}": [{"step": "static", "range": way}] for way in METHODS},
    "smooth, then a scale a token": [{"step": "smooth"}, {"step": "round", "activations": "int8"}],
    **{f"smooth, then one scale, {way}": [{"step": "smooth"}, {"step": "static", "range": way}] for way in ("minmax", "mse")},
}


def with_outliers(store: Store, model: Trained) -> Artifact:
    """The same function, with two large channels behind every norm."""
    with store.draft("checkpoint", stage="outliers", version=1, config={}, parents={"checkpoint": model.checkpoint}) as draft:
        if isinstance(draft, Draft):
            decoder = load_checkpoint(model.checkpoint.root)
            for junction in decoder.junctions():
                if all(isinstance(decoder.get_submodule(port.module), RmsNorm) for port in junction.writers):
                    s_C = torch.ones(junction.channels)
                    s_C[CHANNELS] = 1 / TIMES
                    scale(decoder, junction, s_C)
            save_checkpoint(decoder, draft.root, model.checkpoint.root)
    (found,) = (item for item in store.all() if item.stage == "outliers" and item.parents["checkpoint"] == model.checkpoint.id)
    return store.open(found.id)


def compressed(store: Store, checkpoint: Artifact, tokens: Artifact, steps: list[dict[str, Any]]) -> Artifact:
    for given in steps:
        stage = STEPS[given["step"]]
        known = {name: value for name, value in CALIBRATION.items() if name in stage.config.model_fields}
        parents = {"checkpoint": checkpoint, "tokens": tokens}
        checkpoint = stage(store, load(stage.config, known | given), **{role: parents[role] for role in stage.parents})
    return checkpoint


def rise(old: Score, new: Score) -> Interval:
    """Of the loss, as a share of the old one."""
    order = sorted(old.by_document)
    sums = [[score.by_document[document] for document in order] for score in (old, new)]
    return compare([row[0] for row in sums[0]], [row[0] for row in sums[1]], [row[1] for row in sums[0]]).rise


def rises(store: Store, model: Trained, checkpoint: Artifact) -> Iterator[tuple[str, Interval]]:
    reader = RowReader(TokenStream(model.tokens, "heldout"), ROW)
    text = HeldOut(reader, [1] * model.tokens.manifest.facts["vocab_size"], 200_000)
    before = score_model(load_checkpoint(checkpoint.root), text)
    for name, steps in FORMS.items():
        made = compressed(store, checkpoint, model.tokens, steps)
        yield name, rise(before, score_model(load_checkpoint(made.root), text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["llama", "qwen3_moe", "deepseek_v3"])
    args = parser.parse_args()
    store = Store(args.store)
    for family in args.models:
        model = trained(store, family)
        for kind, checkpoint in (("trained", model.checkpoint), ("outliers", with_outliers(store, model))):
            for name, found in rises(store, model, checkpoint):
                half = 100 * (found.high - found.low) / 2
                print(f"{family} {kind} | {name} | {100 * found.estimate:+.4f} % ± {half:.4f}", flush=True)
    about = machine()
    print(f"torch {about['torch']}, Python {about['python']}, {about['cores']} cores, {about['processor']}")


if __name__ == "__main__":
    main()
