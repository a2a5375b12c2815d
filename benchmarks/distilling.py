"""What a student keeps of its teacher, what it costs, and whether the teacher was worth it: tiny models on the quickstart's text.

    .venv/bin/python benchmarks/distilling.py --store FOLDER [--steps N] [--further N] [--student-steps N] [--teacher-layers 8]
        [--layers 3 2] [--set alpha=0.9 ...] [--json FILE]

The teacher is trained longer than its students. For each number of layers there are students of its width, all trained for as many
steps on the same batches: `alone`, with fresh weights; `distilled`, the same fresh weights with the teacher; `cut`, begun as layers of
the teacher, without it; `cut, distilled`. Quality is that of held-out documents in rows of 256 tokens. Differences are paired, document
by document, with 95 % intervals: against the student that was trained without the teacher, and begun alike. Speed is one stream in
the engine: the median step of a round, engines taking turns in one process; the ratio is that of a round, then the median, and beside
it that of the best rounds, since neighbours on the machine slow a model the more the more of it they drive from the cache.
The store keeps what was made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fidelity_models import QUICKSTART

from lineshaft.base.config import Table, load, merge, nest, parse_assignment
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.distil import cut
from lineshaft.compress.distil_stage import DISTIL, DistilConfig
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.evaluate.statistics import Interval, compare
from lineshaft.model.adopt import ADOPT, AdoptConfig
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import Architecture
from lineshaft.pipeline.recipe import Recipe, read_recipe
from lineshaft.records.tokens import TokenStream
from lineshaft.sched.request import Ask, Sampling
from lineshaft.train.batches import IGNORE, RowReader
from lineshaft.train.finetune import FINETUNE, FinetuneConfig
from lineshaft.train.stage import PRETRAIN

Floats = npt.NDArray[np.float64]
_GQA = {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48}
_SIZES = {"hidden_size": 192, "intermediate_size": 512, "max_position_embeddings": 1024, "initializer_range": 0.05}
PROMPT, ANSWER = 64, 129
"""Tokens of what is timed."""


def shape(layers: int) -> Architecture:
    """A llama of the teacher's width."""
    return Architecture.model_validate(
        {"family": "llama", **_SIZES, "num_hidden_layers": layers, "attention": _GQA, "tie_word_embeddings": True}
    )


@dataclass(frozen=True)
class Bench:
    """The text, and how everything on it is trained."""

    store: Store
    recipe: Recipe
    tokens: Artifact
    tokenizer: Artifact
    teacher_layers: int
    steps: int
    further: int
    student_steps: int
    peak_lr: float

    def fit(self, steps: int, peak_lr: float) -> Table:
        """FitConfig of a run. In float32 on every machine, so that all train the same."""
        optimiser = self.recipe.train.loop.optimiser.model_copy(update={"peak_lr": peak_lr})
        changes = {"steps": steps, "precision": "float32", "log_every": 50, "save_every": 100, "optimiser": optimiser}
        loop = self.recipe.train.loop.model_copy(update=changes)
        return self.recipe.train.model_copy(update={"loop": loop}).model_dump(exclude={"model"})

    @property
    def same(self) -> Table:
        """Of every student."""
        return self.fit(self.student_steps, self.peak_lr)

    def alone(self, layers: int) -> Artifact:
        """Fresh weights, the text alone."""
        return self.pretrained(self.same, layers)

    def pretrained(self, fit: Table, layers: int) -> Artifact:
        config = self.recipe.train.model_validate(fit | {"model": shape(layers)})
        return PRETRAIN(self.store, config, tokens=self.tokens, tokenizer=self.tokenizer)

    def teacher(self) -> Artifact:
        """Trained, then further, up to half the rate once more: it should know more than a student finds out alone."""
        begun = self.pretrained(self.fit(self.steps, self.peak_lr), self.teacher_layers)
        if not self.further:
            return begun
        config = load(FinetuneConfig, self.fit(self.further, self.peak_lr / 2))
        return FINETUNE(self.store, config, checkpoint=begun, tokens=self.tokens)

    def distilled(self, teacher: Artifact, asked: Mapping[str, Any]) -> Artifact:
        """With the teacher."""
        return DISTIL(self.store, load(DistilConfig, self.same | dict(asked)), checkpoint=teacher, tokens=self.tokens)

    def cut(self, teacher: Artifact, layers: int) -> Artifact:
        """Layers of the teacher, then the text alone."""
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(cut(load_checkpoint(teacher.root), layers), Path(folder), teacher.root)
            begun = ADOPT(self.store, AdoptConfig(folder=folder))
        return FINETUNE(self.store, load(FinetuneConfig, self.same), checkpoint=begun, tokens=self.tokens)


def begin(store: Store, lengths: Mapping[str, Any]) -> Bench:
    """Text and tokenizer of the quickstart."""
    quick = read_recipe(QUICKSTART).recipe
    corpus = INGEST(store, quick.data)
    tokenizer = TRAIN_TOKENIZER(store, quick.tokenizer, corpus=corpus)
    tokens = TOKENIZE(store, quick.tokens, corpus=corpus, tokenizer=tokenizer)
    return Bench(store, quick, tokens, tokenizer, **lengths)


@dataclass(frozen=True)
class Scored:
    """Sums over the predicted tokens of each held-out document that has some."""

    nats_D: Floats
    wrong_D: Floats
    tokens_D: Floats

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats_D.sum() / self.tokens_D.sum())

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the most likely one."""
        return float(1 - self.wrong_D.sum() / self.tokens_D.sum())


@torch.inference_mode()
def score(folder: Path, tokens: Artifact, row: int = 256) -> Scored:
    """All held-out documents, cut into rows as in training; a document is the unit, however many rows it lies in."""
    model, stream = load_checkpoint(folder, dtype=torch.float32), TokenStream(tokens, "heldout")
    reader, starts = RowReader(stream, row), stream.starts()
    sums = np.zeros((3, len(starts)))
    for first in range(0, reader.rows, 8):
        batch = reader.batch(np.arange(first, min(first + 8, reader.rows)))
        logits_TV = model(batch.tokens_T, batch.positions_T, PackedCausal(batch.starts_D, len(batch.tokens_T), row)).double()
        counted_T = batch.targets_T != IGNORE
        targets = batch.targets_T[counted_T]
        nats = torch.nn.functional.cross_entropy(logits_TV[counted_T], targets, reduction="none")
        places = first * row + np.flatnonzero(counted_T.numpy())
        document = np.searchsorted(starts, places, side="right") - 1
        for line, amounts in zip(sums, (nats, logits_TV[counted_T].argmax(-1) != targets, torch.ones_like(nats)), strict=True):
            line += np.bincount(document, amounts.double().numpy(), len(starts))
    return Scored(*sums[:, sums[2] > 0])


def step_times(folders: Mapping[str, Path], tokens: Artifact, rounds: int) -> dict[str, list[float]]:
    """Seconds that one stream waits for a token: the median step of each round. All engines in this process take turns."""
    engines = {name: Engine.load(folder, EngineConfig()) for name, folder in folders.items()}
    stream, times = TokenStream(tokens, "heldout"), {name: [] for name in folders}
    for place in range(rounds + 1):
        prompt = stream.read(place * 997, place * 997 + PROMPT).tolist()
        for name, engine in engines.items():
            engine.submit(Ask(prompt, Sampling(max_tokens=ANSWER, temperature=0, ignore_eos=True)))
            steps = []
            while not engine.idle:
                begun = time.perf_counter()
                engine.step()
                steps.append(time.perf_counter() - begun)
            times[name].append(statistics.median(steps[1:]))
    return {name: found[1:] for name, found in times.items()}


def made(bench: Bench, layers: list[int], settings: Table) -> Iterator[tuple[str, Artifact, str]]:
    """Name, model, and the name of the one that it is compared with."""
    teacher = bench.teacher()
    yield f"teacher, {bench.teacher_layers} layers", teacher, ""
    for count in layers:
        yield f"{count} layers, alone", bench.alone(count), ""
        yield f"{count} layers, distilled", bench.distilled(teacher, {"student": shape(count), **settings}), f"{count} layers, alone"
        yield f"{count} layers, cut", bench.cut(teacher, count), f"{count} layers, alone"
        yield f"{count} layers, cut, distilled", bench.distilled(teacher, {"keep_layers": count, **settings}), f"{count} layers, cut"


def told(interval: Interval) -> str:
    """Estimate and 95 % interval."""
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def against(old: Scored, new: Scored) -> dict[str, str]:
    """Nats a token and share of wrong tokens by which the new one differs; below 0 it is better."""
    nats = compare(old.nats_D, new.nats_D, new.tokens_D).difference
    wrong = compare(old.wrong_D, new.wrong_D, new.tokens_D).difference
    return {"nats": f"{told(nats)} {nats.verdict()}", "wrong": f"{told(wrong)} {wrong.verdict()}"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--further", type=int, default=1200, help="steps that the teacher is trained beyond that")
    parser.add_argument("--student-steps", type=int, help="of every student; as many as --steps where it is left out")
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--teacher-layers", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", default=[3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every distillation, such as alpha=0.9")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given, settings = arguments(), {}
    for text in given.set:
        settings = merge(settings, nest(*parse_assignment(text)))
    shared = {name: getattr(given, name) for name in ("teacher_layers", "steps", "further", "peak_lr")}
    shared["student_steps"] = given.student_steps or given.steps
    bench = begin(Store(given.store), shared)
    print(f"# {json.dumps(machine() | shared | {'set': settings})}")
    models = list(made(bench, given.layers, settings))
    scores = {name: score(model.root, bench.tokens) for name, model, _ in models}
    times = step_times({name: model.root for name, model, _ in models}, bench.tokens, given.rounds)
    top, rows = models[0][0], []
    for name, model, rival in models:
        size, own = model.manifest.facts["parameters"], scores[name]
        ratio = statistics.median(its / mine for mine, its in zip(times[name], times[top], strict=True))
        best = min(times[top]) / min(times[name])
        row = {"name": name, "id": model.id, "parameters": size, "loss": own.loss, "accuracy": own.accuracy, "times": times[name]}
        row |= {"kept": own.accuracy / scores[top].accuracy, "faster": ratio, "faster_best": best} | (
            against(scores[rival], own) if rival else {}
        )
        shown = f"{name:24} {size / 1e6:5.2f} M  loss {own.loss:.4f}  accuracy {own.accuracy:.4f} = {100 * row['kept']:5.1f} %"
        shown += f"  {1e6 * statistics.median(times[name]):4.0f} us a token = x {ratio:.2f}, of the best rounds x {best:.2f}"
        print(shown + (f"  against {rival}: nats {row['nats']}, wrong {row['wrong']}" if rival else ""), flush=True)
        rows.append(row)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "documents": len(scores[top].nats_D), "models": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
