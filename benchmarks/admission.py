"""Adaptive admission against a fixed batch on the real engine: one bursty trace, latencies, and tokens a busy second.

    .venv/bin/python benchmarks/admission.py [--hidden 512] [--layers 8] [--requests 200] [--repeats 3]

A random llama in FP32. The clock is the sum of measured step times, so waiting for the next arrival takes no time here; arrivals
come at a pace set by the engine's own speed. The fixed batch is eight requests, or who is there 50 ms after the first of
them; its answers all run until the longest ends, as in a batch that can't let go of one. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lineshaft.base.machine import machine
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.sched.admission import SchedulerConfig
from lineshaft.sched.request import Ask, Emitted, Sampling

FIXED, PATIENCE_S = 8, 0.05


@dataclass
class Asked:
    at: float
    prompt: list[int]
    answer: int


@dataclass
class Result:
    p99: float
    busy: float
    tokens: int
    wall: float
    """Time with work to do, the loop's own included."""


def model_of(hidden: int, layers: int) -> Decoder:
    table = {
        "family": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 1024,
        "vocab_size": 8000,
        "attention": {"kind": "gqa", "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64},
    }
    model = Decoder(ModelConfig.model_validate(table))
    model.initialise(1)
    return model.eval().requires_grad_(False)


def trace(count: int, unit: float) -> list[Asked]:
    """`unit`: seconds of one decoding step alone. A base rate, and eight times that for a fifth of the time."""
    luck, now, made = random.Random(7), 0.0, []
    base = 0.35 * 0.070 / unit  # requests a second: the load of tests/sched/test_admission_load.py
    while len(made) < count:
        now += luck.expovariate(8 * base)
        if now * base % 35 < 7 or luck.random() < 1 / 8:
            prompt = [luck.randrange(8000) for _ in range(luck.randint(16, 128))]
            made.append(Asked(now, prompt, min(256, 8 + int(luck.expovariate(1 / 56)))))
    return made


def run(engine: Engine, asked: Sequence[Asked], due: Callable[[list[Asked], float], tuple[list[Asked], float]], gang: bool) -> Result:
    """`due`: who is let in at this time, and when to look again if nobody runs."""
    now, left, came, ends = 0.0, list(asked), {}, {}
    busy, wall = 0.0, 0.0
    while left or not engine.idle:
        if left and (engine.idle or not gang):
            batch, then = due(left, now)
            if not batch and engine.idle:
                now = max(now, then)
                continue
            longest = max((own.answer for own in batch), default=0)
            for own in batch:
                left.remove(own)
                sampling = Sampling(max_tokens=longest if gang else own.answer, temperature=0, ignore_eos=True)
                (number,) = engine.submit(Ask(own.prompt, sampling))
                came[number] = own
        before, started = engine.load_now().busy_seconds, time.perf_counter()
        events = engine.step()
        spent = time.perf_counter() - started
        busy, wall, now = busy + engine.load_now().busy_seconds - before, wall + spent, now + spent
        ends |= {event.request: now for event in events if isinstance(event, Emitted) and event.finish}
    latencies = [ends[number] - own.at for number, own in came.items()]
    return Result(float(np.quantile(latencies, 0.99)), busy, sum(own.answer for own in asked), wall)


def arrived(left: list[Asked], now: float) -> tuple[list[Asked], float]:
    return [own for own in left if own.at <= now], left[0].at


def gang_of(left: list[Asked], now: float) -> tuple[list[Asked], float]:
    full_at = left[FIXED - 1].at if len(left) >= FIXED else float("inf")
    begins = min(full_at, left[0].at + PATIENCE_S)
    return [own for own in left[:FIXED] if own.at <= now] if now >= begins else [], begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = model_of(args.hidden, args.layers)

    def engine(**limits: object) -> Engine:
        return Engine(model, EngineConfig(cache_bytes=1 << 30, scheduler=SchedulerConfig.model_validate({"prefix_cache": False, **limits})))

    def step_alone() -> float:
        own = engine()
        own.submit(Ask([1] * 32, Sampling(max_tokens=40, temperature=0, ignore_eos=True)))
        taken = []
        while not own.idle:
            started = time.perf_counter()
            own.step()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    asked = trace(args.requests, step_alone())
    found: dict[str, list[Result]] = {"adaptive": [], "fixed": []}
    for _ in range(args.repeats):
        found["adaptive"].append(run(engine(), asked, arrived, gang=False))
        found["fixed"].append(run(engine(start_batch=FIXED, max_batch=FIXED), asked, gang_of, gang=True))
    p99 = {name: statistics.median(result.p99 for result in results) for name, results in found.items()}
    rate = {name: statistics.median(result.tokens / result.busy for result in results) for name, results in found.items()}
    share = statistics.median(result.busy / result.wall for result in found["adaptive"])
    spread = max((max(r.p99 for r in rs) - min(r.p99 for r in rs)) / p99[name] for name, rs in found.items())
    about = machine()
    print(
        f"admission, {args.requests} requests: P99 fixed {p99['fixed']:.2f} s, adaptive {p99['adaptive']:.2f} s "
        f"({p99['adaptive'] / p99['fixed'] - 1:+.0%}); tokens a busy second fixed {rate['fixed']:.0f}, adaptive {rate['adaptive']:.0f} "
        f"(x {rate['adaptive'] / rate['fixed']:.2f}); busy share while there is work {share:.1%}; spread {spread:.0%}, "
        f"torch {about['torch']}, {torch.get_num_threads()} threads, {about['processor']}"
    )


if __name__ == "__main__":
    main()
