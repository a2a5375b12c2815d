"""Speed and memory of a checkpoint, measured in a fresh process so that nothing else is counted.

The parent calls `measure`; the child (`python -m lineshaft.evaluate.speed`) reads a job as JSON from stdin, runs it on
the engine and writes the result as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config, load
from lineshaft.base.errors import EngineError, LineshaftError
from lineshaft.base.machine import peak_memory_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.sched.request import Ask, Emitted, Sampling

BATCH_REPEATS = 3
"""The batch is run this often and the median taken."""


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


def measure(folder: Path, workload: SpeedConfig, engine: EngineConfig, prompts: list[list[int]]) -> Speed:
    """Run the workload in a fresh process. Raises EngineError with the child's last words if it fails."""
    job = Job(folder=str(folder), workload=workload, engine=engine, prompts=prompts)
    child = subprocess.run(
        [sys.executable, "-m", "lineshaft.evaluate.speed"], input=job.model_dump_json(), capture_output=True, text=True, check=False
    )
    if child.returncode:
        last_words = child.stderr.strip().splitlines()[-1:] or [f"its process ended with status {child.returncode} and said nothing"]
        raise EngineError(f"measuring {folder} failed: {last_words[0]}")
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
        if os.getppid() != parent:
            sys.exit("the process that asked for this measurement has died")
        return _answer(engine, prompts, sampling)

    answer(job.prompts[:1])  # first use of every shape; not what a running server shows
    singles = [answer([prompt]) for prompt in job.prompts[: job.workload.requests]]
    batches = [answer(job.prompts[: job.workload.batch])[1] for _ in range(BATCH_REPEATS)]
    return Speed(
        load_seconds=loaded,
        peak_memory_bytes=peak_memory_bytes(),
        first_token=[first for first, _ in singles],
        latency=[last for _, last in singles],
        batch_seconds=quantile(batches, 0.5),
        threads=torch.get_num_threads(),
    )


def _answer(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> tuple[float, float]:
    """Seconds until the first token of any, and until the last token of all."""
    started, first = time.perf_counter(), 0.0
    for prompt in prompts:
        engine.submit(Ask(prompt, sampling))
    while not engine.idle:
        if any(isinstance(event, Emitted) for event in engine.step()) and not first:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started


if __name__ == "__main__":
    try:
        sys.stdout.write(_run(load(Job, json.load(sys.stdin))).model_dump_json())
    except LineshaftError as refusal:
        sys.exit(" ".join(str(refusal).splitlines()))  # one line, for the parent to show
