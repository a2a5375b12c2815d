"""What each step of compression costs and gives, on one tiny trained llama: seconds, share of the bytes, rise of the held-out loss.

    .venv/bin/python benchmarks/steps.py --store FOLDER [--only NAME ...] [--plot FILE.svg] [--json FILE]

The model is the larger llama of pruning.py. Size: the file of the weights beside that of the dense float32 model, embedding table and
all. Loss: nats a token on all held-out rows of 256 tokens. A step that trains is held against the dense model trained as long, on the
same batches at the same rates, the others against the model that they were given; the rise is in percent, with the 95 % interval of a
bootstrap over rows. The output projection stays dense. The store keeps what was made: seconds are told only of what was made now.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrated import Difference, difference
from fidelity_models import trained
from picture import stacked
from pruning import CHANGES, control, recovery_steps
from qat import ROW, Scored, scored

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.compress.steps import STEPS
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.pipeline.page.svg import Axis, Plot
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import RowReader
from lineshaft.train.finetune import FINETUNE, FinetuneConfig

_FIT = {"sequence_tokens": ROW, "rows": 4, "loop": {"steps": 240, "precision": "float32", "optimiser": {"peak_lr": 1e-3}}}
_PRUNE = {"step": "prune", "rows": 4, "precision": "float32"}
_INT4 = {"format": "int4", "group": 128}
CASES: dict[str, list[dict[str, Any]]] = {
    "round int8": [{"step": "round"}],
    "smooth, static int8": [{"step": "smooth"}, {"step": "static"}],
    "budget 5 bits": [{"step": "budget", "bits": 5.0}],
    "round int4": [{"step": "round", **_INT4}],
    "awq int4": [{"step": "awq", **_INT4}],
    "gptq int4": [{"step": "gptq", **_INT4}],
    "qat int4": [{"step": "qat", **_INT4, **_FIT}],
    "prune 40 %, untrained": [_PRUNE | {"channels": 0.4, "last_recovery_steps": 0}],
    "prune 20 %": [_PRUNE | {"channels": 0.2}],
    "prune 40 %": [_PRUNE | {"channels": 0.4}],
    "prune 40 %, gptq int4": [_PRUNE | {"channels": 0.4}, {"step": "gptq", **_INT4}],
    "distil 3 of 4 layers": [{"step": "distil", "keep_layers": 3, **_FIT}],
}
TRAINED = ("qat", "prune", "distil")


@dataclass(frozen=True)
class Result:
    """What one case cost and gave."""

    name: str
    seconds: float | None
    """Null: the store had it."""
    share: float
    """Bytes of the weights' file beside the dense model's."""
    loss: float
    """Nats a token."""
    rise: Difference
    control: str
    """What the rise is beside."""

    def __str__(self) -> str:
        took = "-" if self.seconds is None else f"{self.seconds:.0f} s"
        return f"{self.name} | {took} | {self.share:.3f} | {self.loss:.4f} | {self.rise} | {self.control}"


@dataclass(frozen=True)
class Bench:
    """The model, its text, and what it is held against."""

    store: Store
    checkpoint: Artifact
    tokens: Artifact

    @property
    def parents(self) -> dict[str, Artifact]:
        return {"checkpoint": self.checkpoint, "tokens": self.tokens}

    def score(self, checkpoint: Artifact) -> Scored:
        return scored(load_checkpoint(checkpoint.root), RowReader(TokenStream(self.tokens, "heldout"), ROW))

    def made(self, steps: list[dict[str, Any]]) -> tuple[Artifact, float | None]:
        """The last step's checkpoint, and the seconds that those took which were not in the store."""
        parents, taken = self.parents, None
        for told in steps:
            stage, began = STEPS[told["step"]], time.monotonic()
            request = stage.request(load(stage.config, told), **{role: parents[role] for role in stage.parents})
            fresh = self.store.find(request.id) is None
            parents |= {"checkpoint": request.carry_out(self.store)}
            taken = (taken or 0.0) + time.monotonic() - began if fresh else taken
        return parents["checkpoint"], taken

    def beside(self, step: dict[str, Any]) -> tuple[Artifact, str]:
        """What a chain that begins with this step is held against."""
        if step["step"] not in TRAINED:
            return self.checkpoint, "the model"
        if step["step"] == "prune":
            config = load(PruneConfig, step)
            steps = recovery_steps(self.checkpoint, config)
            if not steps:
                return self.checkpoint, "the model"
            return control(self.store, self.checkpoint, self.tokens, config, steps), f"{steps} steps of training"
        fit = {name: step[name] for name in _FIT}
        return FINETUNE(self.store, load(FinetuneConfig, fit), **self.parents), f"{step['loop']['steps']} steps of training"


def results(bench: Bench, names: list[str]) -> Iterator[Result]:
    """One case after the other."""
    size = weights_of(bench.checkpoint)
    for name in names:
        (made, seconds), (rival, told) = bench.made(CASES[name]), bench.beside(CASES[name][0])
        ours, theirs = bench.score(made), bench.score(rival)
        yield Result(name, seconds, weights_of(made) / size, ours.loss, difference(ours, theirs, theirs), told)


def weights_of(checkpoint: Artifact) -> int:
    """Bytes of its weights' files."""
    return sum(file.stat().st_size for file in checkpoint.root.glob("*.safetensors"))


def picture(found: list[Result]) -> str:
    """Size and rise of the loss, as an SVG file: fewer bits above, smaller models below, whose losses rise on another scale."""
    smaller = [one for one in found if CASES[one.name][0]["step"] in ("prune", "distil")]
    titled = [("Fewer bits", [one for one in found if one not in smaller]), ("Smaller models", smaller)]
    return stacked([(f"{title}: loss against bytes", drawn(title, some)) for title, some in titled if some])


def drawn(title: str, found: list[Result]) -> Plot:
    ends = [end for one in found for end in (one.rise.low, one.rise.high)]
    across = Axis.over("bytes beside float32, embeddings and all", [one.share for one in found], air=0.25)
    axes = across, Axis.over("rise of the loss, percent", ends, zero=True)
    legend = [("untrained: beside the model", 0), ("trained: beside training as long", 1)]
    plot = Plot(title.replace(" ", "-").lower(), title, "; ".join(map(str, found)), *axes, legend)
    for one in found:
        series = 0 if one.control == "the model" else 1
        plot.line([(one.share, one.rise.low), (one.share, one.rise.high)], series, "line whisker")
        plot.marker((one.share, one.rise.mean), series, str(one))
    plot.notes([((one.share, one.rise.mean), one.name) for one in found])
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES).replace("%", "%%"))
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    store = Store(given.store)
    model = trained(store, "llama", **CHANGES["llama"])
    bench, found = Bench(store, model.checkpoint, model.tokens), []
    print(f"{json.dumps(machine())}\nloss {bench.score(model.checkpoint).loss:.4f}", flush=True)
    print("step | seconds | share | loss | rise | beside", flush=True)
    for one in results(bench, given.only):
        print(one, flush=True)
        found.append(one)
    if given.plot:
        given.plot.write_text(picture(found))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "results": [asdict(one) for one in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
