"""Our engine beside others on one model: rounds interleaved, every engine in a process of its own. How to read it: docs/benchmarks.md.

    .venv/bin/python benchmarks/engine.py FOLDER [--precision int8] [--peer vllm=PYTHON] [--peer openvino=PYTHON:FOLDER] [--quick]
    .venv/bin/python benchmarks/engine.py half      # a random llama of 0.53 G weights, made in a temporary folder

transformers of this environment always takes part unless --no-transformers. A peer is NAME=PYTHON, the interpreter in which it is
installed, or NAME=PYTHON:PATH where it reads another folder or file than ours; for llama.cpp NAME=LLAMA_SERVER:FILE.gguf. Ratios say how
many times as good ours is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from contest import Contest, Contestant, Figure, Options
from half import folder_of
from workload import QUICK, Workload, precision_of, random_prompts, read_bytes, read_config, read_rate

from lineshaft.base.config import merge, nest, parse_assignment
from lineshaft.base.machine import machine

OURS, LOOSE, SHARING = "lineshaft", "lineshaft batch_invariant=false", "lineshaft prefix cache"
PEERS = ("transformers", "vllm", "openvino", "llama.cpp")


@dataclass(frozen=True)
class Line:
    """One figure of the table: what, unit, values by contestant, and whether less is better."""

    what: str
    unit: str
    found: dict[str, Figure]
    less: bool = False

    def told(self) -> str:
        ours = self.found[OURS].median
        parts = [f"{OURS} {self.found[OURS].told()}"]
        for name, figure in self.found.items():
            if name != OURS:
                ratio = figure.median / ours if self.less else ours / figure.median
                parts.append(f"{name} {figure.told()} ratio {ratio:.2f}")
        return f"{self.what}, {self.unit}: {'; '.join(parts)}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint, or `half`")
    parser.add_argument("--precision", choices=["bf16", "int8", "int4"], help="what the folder must hold; default: what it holds")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON[:PATH]", help=", ".join(PEERS))
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--own", action="store_true", help="ours also with batch_invariant=false, and with its prefix cache")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=VALUE", help="a setting of our engine, as activations=int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--cache-gib", type=int, default=1, help="of each engine")
    parser.add_argument("--quick", action="store_true", help="short prompts, 4 requests, 1 round: shows that all run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    asked = parser.parse_args()
    for text in asked.peer:
        name, _, rest = text.partition("=")
        if name not in PEERS or not rest:
            parser.error(f"--peer {text}: NAME=PYTHON or NAME=PYTHON:PATH, NAME one of {', '.join(PEERS)}")
        if name == "llama.cpp" and ":" not in rest:
            parser.error(f"--peer {text}: llama.cpp=LLAMA_SERVER:FILE.gguf")
    return asked


def contestants(asked: argparse.Namespace, folder: Path, dense: bool, workload: Workload) -> list[Contestant]:
    dtype = "bfloat16" if dense else None
    base = Options(str(folder.resolve()), dtype, asked.threads, asked.cache_gib, workload.context, workload.requests)
    engine = {}
    for text in asked.engine:
        engine = merge(engine, nest(*parse_assignment(text)))
    made = [Contestant(OURS, "lineshaft", sys.executable, replace(base, engine=engine))]
    if asked.own:
        loose = {"batch_invariant": False, "scheduler": {"prefix_cache": False}}
        made.append(Contestant(LOOSE, "lineshaft", sys.executable, replace(base, engine=loose)))
        made.append(Contestant(SHARING, "lineshaft", sys.executable, replace(base, engine={"scheduler": {}})))
    named = {name: rest for name, _, rest in (text.partition("=") for text in asked.peer)}
    if not asked.no_transformers:
        named = {"transformers": sys.executable} | named
    for name, rest in named.items():
        program, _, path = rest.partition(":")
        own = replace(base, folder=str(Path(path).resolve()) if path else base.folder)
        if name == "llama.cpp":
            made.append(Contestant(name, name, sys.executable, replace(own, program=program)))
        else:
            made.append(Contestant(name, name, program, own))
    return made


def compared(contest: Contest) -> list[str]:
    return [one.name for one in contest.contestants if one.name != SHARING]


def measure(contest: Contest, workload: Workload, rounds: int) -> None:
    """Every figure in every round, contestant after contestant. Round 0 warms up: packing, compilation, allocators."""
    alone = [(workload.prompt, 8)]
    for figure, lengths in (("warm", alone), ("warm", alone), ("warm", [(workload.long, 1)])):
        contest.round(0, figure, lengths, compared(contest))
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        contest.round(number, "first", [(workload.prompt, 1)], compared(contest))
        contest.round(number, "whole", [(workload.prompt, workload.output)], compared(contest))
        contest.round(number, "long", [(workload.long, 1)], compared(contest))
        contest.round(number, "batch", workload.batch(), compared(contest))


def lines(contest: Contest, workload: Workload) -> list[Line]:
    names = compared(contest)

    def figure(name: str, made_of: tuple[str, ...], value: Callable[..., float]) -> Figure:
        """One value a round, from that round's samples."""
        rows = list(zip(*(contest.values(part, name) for part in made_of), strict=True))
        disturbed = any(sample.disturbed for row in rows for sample in row)
        return Figure([value(*(sample.seconds for sample in row)) for row in rows], disturbed)

    def line(what: str, unit: str, made_of: tuple[str, ...], value: Callable[..., float], less: bool = False) -> Line:
        return Line(what, unit, {name: figure(name, made_of, value) for name in names}, less)

    answered = sum(output for _, output in workload.batch())
    loads = {one.name: Figure([one.told["seconds"]], False) for one in contest.contestants if one.name in names}
    return [
        Line("load", "s", loads, less=True),
        line(f"first token after {workload.prompt}", "ms", ("first",), lambda first: 1000 * first, less=True),
        line(
            f"one stream, {workload.output} after {workload.prompt}", "tokens/s", ("first", "whole"),
            lambda first, whole: (workload.output - 1) / (whole - first),
        ),
        line(f"prompt of {workload.long}", "tokens/s", ("long",), lambda long: workload.long / long),
        line(f"{workload.requests} requests at once", "output tokens/s", ("batch",), lambda batch: answered / batch),
    ]  # fmt: skip


def prefix_line(contest: Contest, workload: Workload, rounds: int) -> str | None:
    """Time to the first token of a prompt whose beginning is in the cache, and of one whose is not."""
    sharing = next((one for one in contest.contestants if one.name == SHARING), None)
    if sharing is None:
        return None
    found: dict[str, list[float]] = {"miss": [], "hit": []}
    for number in range(rounds + 1):
        beginning = contest.prompts(workload.long // 2)
        for kind in found:
            taken, _ = sharing.ask([beginning + contest.prompts(32)], [1], {})
            found[kind] += [1000 * taken] if number else []  # the first warms up
    miss, hit = (Figure(values, False) for values in found.values())
    ratio = miss.median / hit.median
    return f"first token after {workload.long // 2} shared and 32 own tokens, ms: miss {miss.told()}; hit {hit.told()} ratio {ratio:.2f}"


def last_line(contest: Contest, decode: Figure, weights: int, rate: float, threads: int) -> str:
    about, share = machine(), decode.median * weights / rate
    return (
        f"{contest.versions()}; {about['processor']}, {threads} threads; reads "
        f"{rate / 1e9:.1f} GB/s, a token {weights / 1e9:.2f} GB: decoding reaches {share:.0%} of {rate / weights:.1f} tokens/s"
    )


def main() -> int:
    asked = arguments()
    workload, rounds = (QUICK, 1) if asked.quick else (Workload(), asked.rounds)
    torch.set_num_threads(asked.threads)
    with folder_of(asked.folder) as folder:
        config = read_config(folder)
        found = precision_of(config)
        if asked.precision not in (None, found):
            print(f"{folder} holds {found} weights, not {asked.precision}: name a folder in that precision", file=sys.stderr)
            return 2
        weights, prompts = read_bytes(folder, config), random_prompts(config["vocab_size"])
        with Contest(contestants(asked, folder, found == "bf16", workload), prompts, OURS) as contest:
            measure(contest, workload, rounds)
            return report(asked, contest, workload, rounds, weights, found)


def report(asked: argparse.Namespace, contest: Contest, workload: Workload, rounds: int, weights: int, precision: str) -> int:
    rate = read_rate()
    table, prefix = lines(contest, workload), prefix_line(contest, workload, rounds)
    for one in contest.contestants:
        print(f"{one.name}: {one.told['about']}")
    for line in table:
        print(line.told())
    if prefix:
        print(prefix)
    print(last_line(contest, table[2].found[OURS], weights, rate, asked.threads))
    if said := contest.disturbance():
        print(said)
    if asked.json:
        about = {"threads": asked.threads, "precision": precision, "workload": asdict(workload)}
        contest.record(asked.json, **about, read_bytes_a_second=rate, weight_bytes_a_token=weights)
    return 1 if contest.failures else 0


if __name__ == "__main__":
    sys.exit(main())
