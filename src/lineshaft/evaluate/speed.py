"""Speed and memory of a checkpoint, measured in a fresh process so that nothing else is counted; then what it writes.

The parent calls `measure`; the child (`python -m lineshaft.evaluate.speed`) reads a job as JSON from stdin, runs it on
the engine and writes the result as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config, load
from lineshaft.base.errors import EngineError, LineshaftError, ModelError
from lineshaft.base.machine import peak_memory_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.sched.request import Ask, Emitted, Finish, Refused, Sampling

BATCH_REPEATS = 3
"""The batch is run this often and the median taken."""
WRITTEN_AT_ONCE = 64
"""Texts that the engine is asked for at once; it works on as many of them together as its scheduler allows."""


class SpeedConfig(Config):
    """The workload: every request reads `prompt_tokens` of held-out text and produces `output_tokens`."""

    prompt_tokens: PositiveInt = 128
    output_tokens: int = Field(32, ge=2)
    """Two at least: the speed of decoding is taken after the first."""
    requests: PositiveInt = 20
    """Requests one after another, for latency quantiles and single-stream speed."""
    batch: PositiveInt = 8
    """Requests at once, for throughput."""


class Job(Config):
    """What the child process is asked to do."""

    folder: str
    workload: SpeedConfig
    engine: EngineConfig
    prompts: list[list[int]]
    written: list[list[int]] = []
    """Prompts to go on with once everything is measured, each as far as `most_written` tokens or an end token."""
    most_written: PositiveInt = 1


class Answer(Config):
    """How the model went on with one of `Job.written`."""

    ids: list[int]
    finish: Finish
    """`stop`: the last id is an end token and no text."""


class Speed(Config):
    """What the child process measured. Times in seconds."""

    load_seconds: float
    """Reading and building the model; starting Python is not counted."""
    peak_memory_bytes: int
    first_token: list[float]
    """Of each single request, from submission to its first token."""
    latency: list[float]
    """Of each single request, from submission to its last token."""
    batch_seconds: float
    threads: int
    answers: list[Answer] = []
    """To `Job.written`. They depend on neither machine load nor company, and are no measurement."""


def measure(job: Job) -> Speed:
    """Do the job in a fresh process. Raises EngineError with the child's last words if it fails."""
    child = subprocess.run(
        [sys.executable, "-m", "lineshaft.evaluate.speed"], input=job.model_dump_json(), capture_output=True, text=True, check=False
    )
    if child.returncode:
        last_words = child.stderr.strip().splitlines()[-1:] or [f"its process ended with status {child.returncode} and said nothing"]
        raise EngineError(f"measuring {job.folder} failed: {last_words[0]}")
    return load(Speed, json.loads(child.stdout))


def quantile(samples: list[float], share: float) -> float:
    """The sample that `share` of all samples do not exceed (linear between neighbours, as numpy does it)."""
    return float(np.quantile(samples, share))


def _run(job: Job) -> Speed:
    started = time.perf_counter()
    scheduler = job.engine.scheduler.model_copy(update={"prefix_cache": False})  # prompts come again here, and are to be read again
    engine = Engine.load(Path(job.folder), job.engine.model_copy(update={"scheduler": scheduler}))
    loaded = time.perf_counter() - started
    sampling = Sampling(max_tokens=job.workload.output_tokens, temperature=0, ignore_eos=True)
    parent = os.getppid()

    def answer(prompts: list[list[int]]) -> tuple[float, float]:
        _check_parent(parent)
        return _answer(engine, prompts, sampling)

    answer(job.prompts[:1])  # first use of every shape; not what a running server shows
    singles = [answer([prompt]) for prompt in job.prompts[: job.workload.requests]]
    batches = [answer(job.prompts[: job.workload.batch])[1] for _ in range(BATCH_REPEATS)]
    peak = peak_memory_bytes()  # before the texts, which are no part of the workload
    return Speed(
        load_seconds=loaded,
        peak_memory_bytes=peak,
        first_token=[first for first, _ in singles],
        latency=[last for _, last in singles],
        batch_seconds=quantile(batches, 0.5),
        threads=torch.get_num_threads(),
        answers=list(_written(engine, job, parent)),
    )


def _check_parent(parent: int) -> None:
    if os.getppid() != parent:
        sys.exit("the process that asked for this measurement has died")


def _answer(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> tuple[float, float]:
    """Seconds until the first token of any, and until the last token of all."""
    started, first = time.perf_counter(), 0.0
    for prompt in prompts:
        engine.submit(Ask(prompt, sampling))
    while not engine.idle:
        if any(isinstance(event, Emitted) for event in engine.step()) and not first:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started


def _written(engine: Engine, job: Job, parent: int) -> Iterator[Answer]:
    """Greedy answers, in the order of the prompts."""
    sampling = Sampling(max_tokens=job.most_written, temperature=0)
    for first in range(0, len(job.written), WRITTEN_AT_ONCE):
        numbers = [engine.submit(Ask(prompt, sampling))[0] for prompt in job.written[first : first + WRITTEN_AT_ONCE]]
        told: dict[int, list[Emitted]] = {number: [] for number in numbers}
        while not engine.idle:
            _check_parent(parent)
            for event in engine.step():
                if isinstance(event, Refused):
                    raise ModelError(event.message)
                if isinstance(event, Emitted):
                    told[event.request].append(event)
        for events in told.values():
            finish = events[-1].finish
            assert finish is not None  # the engine is idle
            yield Answer(ids=[event.token for event in events], finish=finish)


if __name__ == "__main__":
    try:
        sys.stdout.write(_run(load(Job, json.load(sys.stdin))).model_dump_json())
    except LineshaftError as refusal:
        sys.exit(" ".join(str(refusal).splitlines()))  # one line, for the parent to show
