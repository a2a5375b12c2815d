"""Our engine beside transformers on one checkpoint: prefill and decode of a single stream, FP32, the same tokens.

    .venv/bin/python benchmarks/engine.py CHECKPOINT_FOLDER [--prompt 128] [--output 64] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from lineshaft.base.machine import machine
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.sched.request import Ask, Sampling

Run = Callable[[list[int], int], tuple[float, list[int]]]


def ours(folder: Path) -> Run:
    engine = Engine.load(folder, EngineConfig(dtype="float32"))

    def run(prompt: list[int], output: int) -> tuple[float, list[int]]:
        started, tokens = time.perf_counter(), []
        engine.submit(Ask(prompt, Sampling(max_tokens=output, temperature=0, ignore_eos=True)))
        while not engine.idle:
            tokens += [emitted.token for emitted in engine.step()]
        return time.perf_counter() - started, tokens

    return run


def theirs(folder: Path) -> Run:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompt: list[int], output: int) -> tuple[float, list[int]]:
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - started, made[0, len(prompt) :].tolist()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    runs = {"lineshaft": ours(args.folder), "transformers": theirs(args.folder)}
    vocabulary = transformers.AutoConfig.from_pretrained(args.folder).vocab_size
    prompt = torch.randint(3, vocabulary, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):  # the first round warms up
        for name, run in runs.items():
            first, whole = run(prompt, 1)[0], run(prompt, args.output)[0]
            if repeat:
                prefill[name].append(args.prompt / first)
                decode[name].append((args.output - 1) / (whole - first))
    same = runs["lineshaft"](prompt, args.output)[1] == runs["transformers"](prompt, args.output)[1]
    about = machine()
    for what, found in (("prefill", prefill), ("decode", decode)):
        mine, peer = (statistics.median(found[name]) for name in runs)
        spread = max((max(values) - min(values)) / statistics.median(values) for values in found.values())
        print(
            f"{what} tokens/s: lineshaft {mine:.1f}, transformers {version('transformers')} {peer:.1f}, ratio {mine / peer:.2f}, "
            f"spread {spread:.0%}, same tokens {same}, torch {about['torch']}, {torch.get_num_threads()} threads, {about['processor']}"
        )


if __name__ == "__main__":
    main()
