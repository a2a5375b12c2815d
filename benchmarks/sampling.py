"""What choosing tokens costs: the op beside what it is compared with, and beside a whole step of the engine.

    .venv/bin/python benchmarks/sampling.py op [--rows 16] [--rounds 7]            # milliseconds a step of so many rows
    .venv/bin/python benchmarks/sampling.py engine [FOLDER] [--requests 16] [--tokens 32] [--rounds 5]

op: the native kernel, and transformers' processors with torch.multinomial on the same logits, in turns. Floor: the logits are read
once (rows * vocabulary * 4 bytes at the speed of a sum of them in the same run). engine: output tokens a second, greedy and sampled in
turns in one process; FOLDER or a random llama of 0.53 G weights in bf16 (half.py). Medians; the spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from half import folder_of
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lineshaft.base.machine import machine
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.runner import drawn
from lineshaft.engine.sampler import Sampler
from lineshaft.sched.request import Ask, Request, Sampling

VOCABULARIES = 32000, 151936
RULES = {
    "temperature 1": {},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top-k 20, top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "temperature 0.7, min-p 0.05": {"temperature": 0.7, "min_p": 0.05},
}


def theirs(rule: dict[str, float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """All rows at once, as generate() does it."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(rule.get("temperature", 1.0)))])
    if "top_k" in rule:
        warpers.append(TopKLogitsWarper(int(rule["top_k"])))
    if "top_p" in rule:
        warpers.append(TopPLogitsWarper(rule["top_p"]))
    if "min_p" in rule:
        warpers.append(MinPLogitsWarper(rule["min_p"]))
    return lambda logits: torch.multinomial(warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits).softmax(-1), 1)


def turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds, each way in turn; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begun)
    return {name: found[1:] for name, found in times.items()}


def told(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.2f} ({1e3 * min(times):.2f} to {1e3 * max(times):.2f})"


def op(given: argparse.Namespace) -> None:
    for vocabulary in VOCABULARIES:
        logits = torch.randn(given.rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
        for name, rule in RULES.items():
            requests = [Request(n, 1, Sampling.model_validate({**rule, "seed": n}), frozenset(), [0]) for n in range(given.rows)]
            sampler, other = Sampler(drawn), theirs(rule)
            ways = {
                "ours": lambda logits=logits, requests=requests, sampler=sampler: sampler(logits.numpy(), requests),
                "transformers": lambda logits=logits, other=other: other(logits),
                "floor": logits.sum,
            }
            times = turns(ways, given.rounds)
            ratio = statistics.median(times["ours"]) / statistics.median(times["transformers"])
            shown = ", ".join(f"{way} {told(found)}" for way, found in times.items())
            print(f"  {vocabulary} tokens, {name}: {shown} ms, ratio {ratio:.3f}", flush=True)


def produced(engine: Engine, requests: int, tokens: int, rule: dict[str, float]) -> float:
    """Output tokens a second after every prompt is read."""
    for number in range(requests):
        sampling = Sampling.model_validate({**rule, "seed": number, "max_tokens": tokens, "ignore_eos": True})
        engine.submit(Ask([100 + number, *range(200, 216)], sampling))
    while any(len(request.tokens) <= request.prompt_tokens for request in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    begun, made = time.perf_counter(), 0
    while len(engine.scheduler.running) == requests:
        made += len(engine.step())
    took = time.perf_counter() - begun
    while not engine.idle:
        engine.step()
    return made / took


def engine(given: argparse.Namespace) -> None:
    with folder_of(given.folder) as folder:
        found = Engine.load(folder, EngineConfig.model_validate({"scheduler": {"preset": "throughput"}}))
        ways = {"greedy": {"temperature": 0.0}, **RULES}
        rounds = [
            {name: produced(found, given.requests, given.tokens, rule) for name, rule in ways.items()} for _ in range(given.rounds + 1)
        ][1:]
        for name in ways:
            speeds, ratios = [seen[name] for seen in rounds], [seen[name] / seen["greedy"] for seen in rounds]
            spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
            print(f"  {name}: {statistics.median(speeds):.1f} tokens/s ({spread}), {statistics.median(ratios):.3f} of greedy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for name, run in (("op", op), ("engine", engine)):
        kind = kinds.add_parser(name)
        kind.set_defaults(run=run)
        kind.add_argument("--rounds", type=int, default=7 if name == "op" else 5)
        if name == "op":
            kind.add_argument("--rows", type=int, default=16)
        else:
            kind.add_argument("folder", nargs="?", default="half")
            kind.add_argument("--requests", type=int, default=16)
            kind.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    given.run(given)


if __name__ == "__main__":
    main()
