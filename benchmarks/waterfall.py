"""What each part of the engine is worth, from an eager PyTorch loop to the final engine. How to read it: docs/benchmarks.md.

    .venv/bin/python benchmarks/waterfall.py FOLDER [--int8 FOLDER] [--int4 FOLDER] [--rounds 3] [--plot FILE.svg] [--quick]
    .venv/bin/python benchmarks/waterfall.py half      # a random llama of 0.53 G weights, made in a temporary folder

Every rung runs the same work: one stream of 64 tokens after 128, and 16 requests at once. Rounds are interleaved, each engine in a
process of its own that stands still while others run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contest import Contest, Contestant, Figure, Options
from half import folder_of
from picture import stacked
from workload import QUICK, Workload, precision_of, random_prompts, read_config

from lineshaft.base.machine import machine
from lineshaft.ops.isa import FORCE, library
from lineshaft.pipeline.page.svg import bars

Measured = dict[str, Figure]
"""By what was measured."""


@dataclass(frozen=True)
class Rung:
    """One step of the way: which process runs it, and how."""

    name: str
    process: str
    mode: dict[str, Any] = field(default_factory=dict)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint with dense weights, or `half`")
    parser.add_argument("--int8", type=Path, help="the same model with 8-bit weights")
    parser.add_argument("--int4", type=Path, help="the same model with 4-bit weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--cache-gib", type=int, default=1, help="of each engine")
    parser.add_argument("--patience", type=float, default=120, help="seconds; what takes a rung longer is measured in one round only")
    parser.add_argument("--without", action="append", default=[], metavar="ISA", help="leave an instruction set's rung out, such as scalar")
    parser.add_argument("--quick", action="store_true", help="short prompts, 4 requests, 1 round: shows that all run")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    asked, native = parser.parse_args(), library()
    known = native.names() if native is not None else []
    if any(name not in known for name in asked.without) or (asked.without and not set(known) - set(asked.without)):
        parser.error(f"--without {' '.join(asked.without)}: name some of {', '.join(known) or 'nothing: no native kernels here'}, not all")
    return asked


def way(asked: argparse.Namespace, folder: Path, workload: Workload) -> tuple[list[Contestant], list[Rung]]:
    """The processes, and the rungs from the first to the last. Rungs that differ only in how they are asked share a process."""
    base = Options(str(folder.resolve()), "bfloat16", asked.threads, asked.cache_gib, workload.context, workload.requests)
    loose = replace(base, engine={"batch_invariant": False, "scheduler": {"prefix_cache": False}})
    made = [
        Contestant("transformers", "transformers", sys.executable, base),
        Contestant("ours in PyTorch", "lineshaft", sys.executable, loose, {FORCE: "none"}),
        Contestant("ours in PyTorch, equal bits", "lineshaft", sys.executable, base, {FORCE: "none"}),
    ]
    rungs = [
        Rung("transformers, eager, one at a time", "transformers", {"serial": True}),
        Rung("our model in PyTorch, one at a time", "ours in PyTorch", {"serial": True}),
        Rung("+ continuous batching", "ours in PyTorch"),
        Rung("+ equal bits in any company", "ours in PyTorch, equal bits"),
    ]
    found = library()
    if found is None:
        print("no native kernels here (lineshaft kernels tells why): the rungs in PyTorch only", file=sys.stderr)
        return made, rungs
    names = [name for name in found.names() if name not in asked.without]
    for name in names:
        made.append(Contestant(f"native {name}", "lineshaft", sys.executable, base, {FORCE: name}))
        rungs.append(Rung(f"native kernels, {name}, op by op", f"native {name}", {"recorded": False}))
    rungs.append(Rung("+ recorded step", f"native {names[-1]}"))
    for bits, path in (("int8", asked.int8), ("int4", asked.int4)):
        if path is not None:
            made.append(Contestant(bits, "lineshaft", sys.executable, replace(base, folder=str(path.resolve()), dtype=None)))
            rungs.append(Rung(f"{bits} weights", bits))
    return made, rungs


def measure(contest: Contest, rungs: list[Rung], workload: Workload, rounds: int, patience: float) -> None:
    """Every figure in every round, rung after rung. Round 0 warms up."""
    work = {"first": [(workload.prompt, 1)], "whole": [(workload.prompt, workload.output)], "batch": workload.batch()}
    for rung in rungs:
        contest.round(0, "warm", [(workload.prompt, 4)], [rung.process], **rung.mode)
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        for what, lengths in work.items():
            for rung in rungs:
                kept = contest.values(f"{rung.name}: {what}", rung.process)
                if not kept or kept[0].seconds <= patience:
                    contest.round(number, f"{rung.name}: {what}", lengths, [rung.process], **rung.mode)


def measured(contest: Contest, rung: Rung, workload: Workload) -> Measured:
    def samples(what: str) -> list[Any]:
        return contest.values(f"{rung.name}: {what}", rung.process)

    first, whole, batch = samples("first"), samples("whole"), samples("batch")
    rates = [(workload.output - 1) / (long.seconds - short.seconds) for short, long in zip(first, whole, strict=False)]
    answered = sum(output for _, output in workload.batch())
    return {
        "one stream": Figure(rates, any(sample.disturbed for sample in first + whole)),
        f"{workload.requests} requests at once": Figure([answered / one.seconds for one in batch], any(one.disturbed for one in batch)),
    }


def lines(table: dict[str, Measured]) -> Iterator[str]:
    """For each rung its tokens a second, and how many times those of the rung before and of the first."""
    rungs = list(table.values())
    for place, (name, found) in enumerate(table.items()):
        parts = []
        for what, figure in found.items():
            before, first = (figure.median / rungs[other][what].median for other in (max(0, place - 1), 0))
            parts.append(f"{what} {figure.told()} tokens/s, {before:.2f} times the rung before, {first:.2f} times the first")
        yield f"{name}: {'; '.join(parts)}"


def picture(table: dict[str, Measured]) -> str:
    """The rungs as bars, one drawing for each figure, as an SVG file."""
    drawn = []
    for place, what in enumerate(next(iter(table.values()))):
        figures = {name: found[what] for name, found in table.items()}
        start = next(iter(figures.values())).median
        rows = [(name, one.median, f"{one.median:.3g}, {one.median / start:.1f}x") for name, one in figures.items()]
        title = f"{what}: tokens/s, and how many times the first"
        drawn.append((title, bars(f"rungs{place}", title, "; ".join(f"{name} {text}" for name, _, text in rows), rows)))
    return stacked(drawn)


def main() -> int:
    asked = arguments()
    workload, rounds = (QUICK, 1) if asked.quick else (Workload(output=64), asked.rounds)
    torch.set_num_threads(asked.threads)
    with folder_of(asked.folder) as folder:
        config = read_config(folder)
        for wanted, path in (("bf16", folder), ("int8", asked.int8), ("int4", asked.int4)):
            if path is not None and (found := precision_of(read_config(path))) != wanted:
                print(f"{path} holds {found} weights, not {wanted}", file=sys.stderr)
                return 2
        made, rungs = way(asked, folder, workload)
        with Contest(made, random_prompts(config["vocab_size"])) as contest:
            measure(contest, rungs, workload, rounds, asked.patience)
            return report(asked, contest, rungs, workload)


def report(asked: argparse.Namespace, contest: Contest, rungs: list[Rung], workload: Workload) -> int:
    running = {one.name for one in contest.contestants}
    table = {rung.name: measured(contest, rung, workload) for rung in rungs if rung.process in running}
    if not table:
        return 1
    for line in lines(table):
        print(line)
    print(f"{contest.versions()}; {machine()['processor']}, {asked.threads} threads")
    if said := contest.disturbance():
        print(said)
    if asked.plot:
        asked.plot.write_text(picture(table))
    if asked.json:
        contest.record(asked.json, threads=asked.threads, workload=asdict(workload))
    return 1 if contest.failures else 0


if __name__ == "__main__":
    sys.exit(main())
