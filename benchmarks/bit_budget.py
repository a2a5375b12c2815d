"""Bits where they do most good: measured policies beside two rules of thumb at equal bytes, on tiny trained models.

    .venv/bin/python benchmarks/bit_budget.py --store FOLDER [--models llama ...] [--plot FILE.svg] [--json FILE]

Weights are first rounded to bfloat16, so that a dense one costs 16 bits; arithmetic is float32 in plain PyTorch. The output projection
stays dense and is not counted. Calibration rows come from the training text. Loss and divergence are those of the first 192 tokens of
held-out documents, with the 95 % interval of paired differences over documents. Models are those of fidelity_models.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fidelity_models import STEPS, Trained, trained
from picture import stacked
from torch import Tensor

from lineshaft.base.machine import machine
from lineshaft.base.store import Store
from lineshaft.compress.budget import Option, Options, allocate, frontier
from lineshaft.compress.config import coding
from lineshaft.compress.plan import MEASURES, BudgetConfig, calibration
from lineshaft.compress.sensitivity import Damage
from lineshaft.compress.ties import Tied, Unit, bytes_of, linear_of, units
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE
from lineshaft.pipeline.page.svg import Axis, Plot
from lineshaft.train.batches import Batch

FORMATS = ["dense", "int8", "int8-32", "int4-128", "int4-32", "int4-32-zeros"]
PRESETS = {
    "FFN 8 bits, attention 16": {"*.mlp.*": "int8", "*.self_attn.*": "dense"},
    "attention 8 bits, FFN 4": {"*.self_attn.*": "int8", "*.mlp.*": "int4-128"},
}
BUDGETS = (4.25, 4.5, 5.0, 6.0, 7.0, 8.25)
"""Bits a weight of further plans, for the drawing."""
Policy = Mapping[str, str]
Tables = list[Tensor]
MOST_BITS = 9
"""Drawn: beyond it nothing is to be seen."""


@dataclass(frozen=True)
class Held:
    """A policy on text that nothing was chosen by."""

    bits: float
    rise: float
    """Of the loss, percent."""
    interval: float
    nats: float
    """Kullback-Leibler a token, from the model before."""
    forecast: float | None = None
    """What the plan's damages add up to."""

    def __str__(self) -> str:
        forecast = f", forecast {self.forecast:.6f}" if self.forecast is not None else ""
        return f"{self.bits:.4f} bits, loss {self.rise:+.4f} % ± {self.interval:.4f}, {self.nats:.6f} nats{forecast}"


class Bench:
    """One model, the text it is measured on, and what its layers take in each format."""

    def __init__(self, model: Trained, rows: int, documents: int) -> None:
        self.root = model.checkpoint.root
        self.sized = load_checkpoint(self.root, dtype=torch.bfloat16)
        self.dense = self.fresh()
        self.rows: list[Batch] = calibration(model.tokens, BudgetConfig(bits=1, rows=rows))
        self.texts = [torch.tensor(text) for text in model.beginnings(documents, 192)]
        self.before = self.tables(self.dense)
        self.layers = [name for name in self.dense.linears() if name != "lm_head"]
        self.weights = sum(linear_of(self.dense, name).weight.numel() for name in self.layers)

    def fresh(self) -> Decoder:
        """The model with weights of bfloat16 and float32 arithmetic."""
        return load_checkpoint(self.root, dtype=torch.bfloat16).float()

    def size(self, layer: str, name: str) -> int:
        return bytes_of(linear_of(self.sized, layer), coding(name))

    @torch.inference_mode()
    def tables(self, model: Decoder) -> Tables:
        """Log-chances [T, vocabulary] of each document, float64."""
        every = (model(text, torch.arange(len(text)), PackedCausal([0], len(text))) for text in self.texts)
        return [F.log_softmax(logits.double(), -1) for logits in every]

    def losses(self, tables: Tables) -> list[float]:
        return [float(F.nll_loss(table[:-1], text[1:])) for table, text in zip(tables, self.texts, strict=True)]

    def held(self, policy: Policy, forecast: float | None = None) -> Held:
        """Every layer in the format of the last pattern that means it."""
        model, size = self.fresh(), 0
        for layer in self.layers:
            name = [name for pattern, name in policy.items() if fnmatchcase(layer, pattern)][-1]
            size += self.size(layer, name)
            if coding(name) != DENSE:
                linear_of(model, layer).recode(coding(name))
        after = self.tables(model)
        losses, before = self.losses(after), self.losses(self.before)
        nats = [float(F.kl_div(q, p, reduction="batchmean", log_target=True)) for p, q in zip(self.before, after, strict=True)]
        rises = [loss - own for loss, own in zip(losses, before, strict=True)]
        share = 100 / statistics.fmean(before)
        interval = 1.96 * statistics.stdev(rises) / len(rises) ** 0.5 * share
        return Held(8 * size / self.weights, statistics.fmean(rises) * share, interval, statistics.fmean(nats), forecast)

    def options(self, own: Sequence[Unit], damage: Damage) -> Options:
        return {
            unit.name: {
                name: Option(sum(self.size(layer, name) for layer in unit.layers), nats) for name, nats in damage[unit.name].items()
            }
            for unit in own
        }

    def planned(self, own: Sequence[Unit], options: Options, bits: float) -> Held:
        """The policy of least damage that takes at most so many bits a weight."""
        found = allocate(options, round(bits * self.weights / 8))
        policy = {pattern: found.formats[unit.name] for unit in own for pattern in unit.patterns}
        return self.held(policy, found.damage)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; equal numbers share their mean rank."""

    def ranks(numbers: Sequence[float]) -> np.ndarray:
        _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def rated(bench: Bench, tied: Tied) -> tuple[list[Unit], dict[str, Damage], dict[str, float]]:
    """The units, what each measure says of them, and the seconds it took."""
    own, said, seconds = units(bench.dense, ["lm_head"], tied), {}, {}
    for name, measure in MEASURES.items():
        begun = time.perf_counter()
        said[name] = measure(bench.dense, bench.rows, own, FORMATS)
        seconds[name] = time.perf_counter() - begun
    return own, said, seconds


def correlations(said: Mapping[str, Damage]) -> dict[str, dict[str, float]]:
    """By estimate: over the units in each format, and over all that is rounded."""
    found: dict[str, dict[str, float]] = {}
    rounded = [name for name in FORMATS if name != "dense"]
    for estimate in ("fisher", "gradient"):
        pairs = {name: [[unit[name] for unit in said[measure].values()] for measure in ("kl", estimate)] for name in rounded}
        found[estimate] = {name: rank_correlation(*pair) for name, pair in pairs.items()}
        found[estimate]["all"] = rank_correlation(*(list(chain.from_iterable(columns)) for columns in zip(*pairs.values(), strict=True)))
    return found


def report(bench: Bench, family: str) -> Iterator[tuple[str, Held | dict[str, float], list[tuple[int, float]] | None]]:
    """(what, figures, the curve of forecasts where there is one), as they are found."""
    _, said, seconds = rated(bench, "none")
    for estimate, found in correlations(said).items():
        yield f"{estimate}: rank correlation with kl", found | {"seconds": seconds[estimate], "seconds of kl": seconds["kl"]}, None
    presets = {name: bench.held(policy) for name, policy in PRESETS.items()}
    for name, preset in presets.items():
        yield name, preset, None
    for name in FORMATS[1:]:
        yield f"all {name}", bench.held({"*": name}), None
    ties: tuple[Tied, ...] = ("model", "layer") if bench.dense.config.moe else ("layer",)
    for tied in ties:
        own, said, _ = rated(bench, tied)
        told = f", experts by {tied}" if bench.dense.config.moe else ""
        for measure in ("kl", "fisher"):
            options = bench.options(own, said[measure])
            for name, preset in presets.items():
                yield f"plan by {measure}{told} at the bytes of: {name}", bench.planned(own, options, preset.bits), None
            if measure == "kl":
                for bits in BUDGETS:
                    curve = frontier(options) if bits == BUDGETS[0] else None
                    yield f"plan by kl{told}, {bits:g} bits", bench.planned(own, options, bits), curve


def picture(drawn: Mapping[str, tuple[dict[str, Held], list[tuple[float, float]]]]) -> str:
    """For each model what plans, presets and single formats measured on held-out text, as an SVG file: divergence and the forecast curve,
    and the rise of the loss with its interval."""
    titled = []
    for family, (points, curve) in drawn.items():
        shown = {name: held for name, held in points.items() if held.bits <= MOST_BITS}
        titled += [
            (f"{family}: what bits are worth", _divergence(family, shown, curve)),
            (f"{family}: what they cost in loss", _loss(family, shown)),
        ]
    return stacked(titled)


def _series(name: str) -> int:
    return 1 if name.startswith("plan") else 2


def _divergence(family: str, points: Mapping[str, Held], curve: Sequence[tuple[float, float]]) -> Plot:
    places = {name: (held.bits, float(np.log10(held.nats))) for name, held in points.items()}
    line = [(bits, float(np.log10(nats))) for bits, nats in curve if bits <= MOST_BITS and nats > 0]
    every = [*places.values(), *line]
    axes = Axis.over("bits a weight", [x for x, _ in every]), Axis.over("divergence, log10 of nats a token", [y for _, y in every])
    legend = [("forecast of the plan by kl", 0), ("plans, held-out text", 1), ("presets and single formats, held-out text", 2)]
    told = "; ".join(f"{name}: {held}" for name, held in points.items())
    plot = Plot(f"{family}-bits", f"{family}: bits and damage", told, *axes, legend)
    plot.line(line, 0)
    for name, place in places.items():
        plot.marker(place, _series(name), f"{name}: {points[name]}")
    return plot


def _loss(family: str, points: Mapping[str, Held]) -> Plot:
    """With the 95 % interval over documents as a bar."""
    ends = [held.rise + side * held.interval for held in points.values() for side in (-1, 1)]
    axes = Axis.over("bits a weight", [held.bits for held in points.values()]), Axis.over("rise of the loss, percent", ends, zero=True)
    legend = [("plans, held-out text", 1), ("presets and single formats, held-out text", 2)]
    plot = Plot(f"{family}-loss", f"{family}: bits and loss", "the loss behind the points above, bars: 95 %", *axes, legend)
    for name, held in points.items():
        plot.line([(held.bits, held.rise - held.interval), (held.bits, held.rise + held.interval)], _series(name), "line whisker")
        plot.marker((held.bits, held.rise), _series(name), f"{name}: {held}")
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=["llama", "qwen3_moe"], default=["llama", "qwen3_moe"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=16, help="of 256 tokens to calibrate on")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    told, drawn = {}, {}
    for family in given.models:
        bench = Bench(trained(Store(given.store), family, given.steps), given.rows, given.documents)
        loss = statistics.fmean(bench.losses(bench.before))
        print(f"{family}: {bench.weights} weights, {len(bench.texts)} documents, loss {loss:.4f}", flush=True)
        points, line, figures = {}, [], {}
        for what, found, curve in report(bench, family):
            shown = found if isinstance(found, Held) else ", ".join(f"{name} {number:.3f}" for name, number in found.items())
            print(f"  {family:10s} {what}: {shown}", flush=True)
            figures[what] = asdict(found) if isinstance(found, Held) else found
            if isinstance(found, Held):
                points[what] = found
            if curve is not None:  # of experts by layer, where there are both
                line = [(8 * size / bench.weights, nats) for size, nats in curve]
        told[family], drawn[family] = {"weights": bench.weights, "loss": loss, "figures": figures}, (points, line)
    if given.plot:
        given.plot.write_text(picture(drawn))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "steps": given.steps, "models": told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
