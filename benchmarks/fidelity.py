"""What the engine's number formats cost: tiny trained models, each variant on native kernels beside the float32 model.

    .venv/bin/python benchmarks/fidelity.py --store FOLDER [--models llama ...] [--json FILE]
    .venv/bin/python benchmarks/fidelity.py --store FOLDER --engine page_tokens=32      # engine settings of every variant

Loss: held-out text scored by the engine as the prompt of a request; its rise over the reference in percent, with the 95 %
interval of the paired differences over independent documents. Greedy: tokens equal up to an answer's first difference. There
the reference has the token that was chosen instead within NEAR_TIE of its best one, or has not. The reference is in
fidelity_reference.py, the models are in fidelity_models.py. Weights are rounded to nearest, routers and embeddings stay dense.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fidelity_models import SHAPES, STEPS, Trained, trained
from fidelity_reference import Reference, Texts, reference

from lineshaft.base.config import load, merge, nest, parse_assignment
from lineshaft.base.machine import machine
from lineshaft.base.store import Store
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.ops.formats import Format, Integer
from lineshaft.ops.isa import describe, library
from lineshaft.sched.request import Ask, Emitted, Event, PromptScored, Sampling

NEAR_TIE = 0.02
"""Nats. Two tokens so close are a coin's toss for any arithmetic that rounds."""
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to run a model."""

    name: str
    weights: Format | None = None
    """Of every linear layer but the output projection, which is then 8 bits by channel; None: all are dense."""
    rest: torch.dtype = torch.float32
    """Of all that is dense, of activations and of the cache."""
    engine: Table = field(default_factory=dict)
    """Further settings of the engine."""


VARIANTS = (
    Variant("float32"),
    Variant("bf16", rest=torch.bfloat16),
    Variant("int8", Integer(8)),
    Variant("int8, rest bf16", Integer(8), torch.bfloat16),
    Variant("int8, int8 activations", Integer(8, packing="int-quantized", activations="int8")),
    Variant("int4/32", Integer(4, 32)),
    Variant("int4/64", Integer(4, 64)),
    Variant("int4/128", Integer(4, 128)),
    Variant("int4/32, zero points", Integer(4, 32, symmetric=False)),
    Variant("int4/32, int8 activations", Integer(4, 32, activations="int8")),
)


@dataclass(frozen=True)
class Measured:
    """A variant beside the reference."""

    loss: float
    """Nats a token."""
    rise: float
    """Percent above the reference's loss."""
    interval: float
    """Half the width of the 95 % interval of the rise."""
    agreed: float
    """Percent of answer tokens before the first difference."""
    whole: int
    """Answers without a difference."""
    answers: int
    near_ties: int
    """First differences where the reference was all but indifferent."""
    widest: float
    """Nats by which the reference prefers its own token, at most, at a first difference."""

    def __str__(self) -> str:
        differ = self.answers - self.whole
        near = f", near-ties {self.near_ties} of {differ}, widest gap {self.widest:.4f}" if differ else ""
        loss = f"loss {self.loss:.4f} ({self.rise:+.4f} % ± {self.interval:.4f})"
        return f"{loss}, same tokens {self.agreed:.1f} %, whole answers {self.whole} of {self.answers}{near}"


def engine_of(folder: Path, variant: Variant, settings: Table) -> Engine:
    """The checkpoint's model in this variant, on native kernels."""
    model = load_checkpoint(folder, dtype=torch.float32)
    if variant.weights is not None:
        for name, linear in model.linears().items():
            linear.recode(Integer(8) if name == "lm_head" else variant.weights)
    for parameter in model.parameters():  # buffers are quantised tensors, their scales and router biases
        parameter.data = parameter.data.to(variant.rest)
    engine = Engine(model, load(EngineConfig, merge(merge({"scheduler": {"max_waiting": 4096}}, variant.engine), settings)))
    assert library() is not None
    assert engine.runner.native is not None
    return engine


def told(engine: Engine, asks: Sequence[Ask]) -> Iterator[tuple[int, Event]]:
    """All events, with the place of the request."""
    places = {engine.submit(ask)[0]: place for place, ask in enumerate(asks)}
    while not engine.idle:
        for event in engine.step():
            yield places[event.request], event


def scored(engine: Engine, rows: Sequence[list[int]]) -> list[float]:
    """Nats a token of each row."""
    found = [0.0] * len(rows)
    for place, event in told(engine, [Ask(row, Sampling(max_tokens=1, temperature=0, logprobs=0), "score") for row in rows]):
        if isinstance(event, PromptScored):
            found[place] = -statistics.fmean(score.logprob for score in event.scores if score is not None)
    return found


def answered(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy answer to each prompt."""
    sampling, answers = Sampling(max_tokens=new_tokens, temperature=0), [[] for _ in prompts]
    for place, event in told(engine, [Ask(prompt, sampling) for prompt in prompts]):
        if isinstance(event, Emitted):
            answers[place].append(event.token)
    return answers


def measure(engine: Engine, texts: Texts, judge: Reference) -> Measured:
    """Score and answer with the engine, and compare."""
    return compare(scored(engine, texts.rows), answered(engine, texts.prompts, texts.new_tokens), judge)


def compare(losses: list[float], answers: list[list[int]], judge: Reference) -> Measured:
    """Losses of the rows and answers to the prompts beside those of the reference."""
    ours, theirs = statistics.fmean(losses), statistics.fmean(judge.losses)
    spread = statistics.stdev(loss - own * ours / theirs for loss, own in zip(losses, judge.losses, strict=True))  # of a ratio of means
    firsts = [first_difference(answer, own) for answer, own in zip(answers, judge.answers, strict=True)]
    gaps = [judge.gap(n, first, answers[n][first]) for n, first in enumerate(firsts) if first < len(judge.answers[n])]
    return Measured(
        loss=ours,
        rise=100 * (ours / theirs - 1),
        interval=100 * 1.96 * spread / len(losses) ** 0.5 / theirs,
        agreed=100 * sum(firsts) / sum(map(len, judge.answers)),
        whole=len(answers) - len(gaps),
        answers=len(answers),
        near_ties=sum(gap < NEAR_TIE for gap in gaps),
        widest=max(gaps, default=0.0),
    )


def first_difference(answer: list[int], own: list[int]) -> int:
    """Where they differ first; their length when they don't. Both end where they say so, hence no one can be the other's beginning."""
    return next((place for place, pair in enumerate(zip(answer, own, strict=False)) if pair[0] != pair[1]), len(own))


def measured(folder: Path, texts: Texts, judge: Reference, settings: Table) -> Iterator[tuple[str, Measured]]:
    """Every variant, and what bf16 costs without us."""
    for variant in VARIANTS:
        yield variant.name, measure(engine_of(folder, variant, settings), texts, judge)
    peer = reference(folder, texts, "bfloat16")
    yield "bf16, PyTorch alone", compare(peer.losses, peer.answers, judge)


def texts_of(model: Trained, sequences: int, prompts: int) -> Texts:
    return Texts(model.beginnings(sequences, 192), model.beginnings(prompts, 48))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--engine", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if library() is None:
        sys.exit(describe())
    settings: Table = {}
    for text in given.engine:
        settings = merge(settings, nest(*parse_assignment(text)))
    told_of: dict[str, Any] = {}
    print(f"{json.dumps(machine())}\n{describe()}; engine settings: {settings or 'as they are'}", flush=True)
    for family in given.models:
        model = trained(Store(given.store), family, given.steps)
        texts = texts_of(model, given.sequences, given.prompts)
        judge = reference(model.checkpoint.root, texts)
        loss, bigram = statistics.fmean(judge.losses), model.bigram_loss(texts.rows)
        size = model.checkpoint.manifest.facts["parameters"]
        about = f"{size / 1e6:.2f} M, {given.steps} steps, {len(texts.rows)} documents"
        print(f"{family}, {about}: loss {loss:.4f}, bigram {bigram:.4f}", flush=True)
        rows = {}
        for name, found in measured(model.checkpoint.root, texts, judge, settings):
            rows[name] = asdict(found)
            print(f"  {family:12s} {name:26s} {found}", flush=True)
        told_of[family] = {"checkpoint": model.checkpoint.id, "parameters": size, "loss": loss, "bigram_loss": bigram, "variants": rows}
    if given.json:
        about = {"machine": machine(), "kernels": describe(), "steps": given.steps, "engine": settings}
        given.json.write_text(json.dumps({**about, "models": told_of}, indent=2) + "\n")


if __name__ == "__main__":
    main()
