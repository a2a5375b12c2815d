"""What the scheduler costs a step, in microseconds: plan and commit of so many requests that decode, no model.

    .venv/bin/python benchmarks/scheduler.py [--requests 64] [--steps 400] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

from lineshaft.base.machine import machine
from lineshaft.ops.reach import Causal
from lineshaft.sched.admission import SchedulerConfig
from lineshaft.sched.groups import layer_groups
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import Request, Sampling
from lineshaft.sched.scheduler import Scheduler


def microseconds(requests: int, steps: int) -> list[float]:
    config = SchedulerConfig(start_batch=requests, max_batch=requests, step_tokens=max(512, 16 * requests))
    scheduler = Scheduler(config, layer_groups([Causal()]), [PagePool(requests * 64)], 16)
    for number in range(1, requests + 1):
        sampling = Sampling(max_tokens=steps + 16)
        scheduler.submit([Request(number, 16, sampling, frozenset(), [number % 50] * 16)])
    taken = []
    while len(taken) < steps:
        started = time.perf_counter_ns()
        plan = scheduler.plan()
        planned = time.perf_counter_ns()
        tokens = [1] * len(plan.sampling)
        sampled = time.perf_counter_ns()
        scheduler.commit(plan, tokens)
        ended = time.perf_counter_ns()
        if len(plan.chunks) == plan.tokens == requests:
            taken.append((planned - started + ended - sampled) / 1000)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    runs = [microseconds(args.requests, args.steps) for _ in range(args.repeats)]
    medians, means = ([average(run) for run in runs] for average in (statistics.median, statistics.fmean))
    about = machine()
    print(
        f"scheduler, {args.requests} requests decoding: {statistics.median(medians):.0f} us a step (median), "
        f"{statistics.median(means):.0f} us mean with the steps that take and publish pages, "
        f"spread {(max(means) - min(means)) / statistics.median(means):.0%}, python {about['python']}, {about['processor']}"
    )


if __name__ == "__main__":
    main()
