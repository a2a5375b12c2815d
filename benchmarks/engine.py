"""Our engine and transformers on one model, in one process, rounds interleaved: alone, sixteen at once, and shared beginnings.

    .venv/bin/python benchmarks/engine.py FOLDER [--dtype bfloat16] [--prompt 128] [--output 32] [--batch 16] [--repeats 3]
    .venv/bin/python benchmarks/engine.py half      # a random llama of 0.53 G weights, made in a temporary folder

Greedy, ignoring end tokens, prompts of random ids. transformers answers several prompts of one length as one batch, which
is its best case. The floor is the time to read the weights once, at the speed of one pass over a large tensor here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from lineshaft.base.machine import machine
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.sched.request import Ask, Emitted, Sampling

HALF = {
    "family": "llama",
    "hidden_size": 1280,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "attention": {"kind": "gqa", "num_attention_heads": 20, "num_key_value_heads": 10, "head_dim": 64},
}
Run = Callable[[list[list[int]], int], list[list[int]]]


@contextmanager
def folder_of(name: str):
    if name != "half":
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Decoder(ModelConfig.model_validate(HALF))
        model.initialise(1)
        save_checkpoint(model.to(torch.bfloat16), Path(folder), Path(folder))
        del model
        yield Path(folder)


def ours(engine: Engine) -> Run:
    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        numbers = [engine.submit(Ask(prompt, Sampling(max_tokens=output, temperature=0, ignore_eos=True)))[0] for prompt in prompts]
        said: dict[int, list[int]] = {number: [] for number in numbers}
        while not engine.idle:
            for event in engine.step():
                if isinstance(event, Emitted):
                    said[event.request].append(event.token)
        return [said[number] for number in numbers]

    return run


def theirs(model: transformers.PreTrainedModel) -> Run:
    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
        return made[:, ids.shape[1] :].tolist()

    return run


def seconds(run: Run, prompts: list[list[int]], output: int) -> float:
    started = time.perf_counter()
    run(prompts, output)
    return time.perf_counter() - started


def read_rate() -> float:
    """Bytes a second of one sum over 1 GiB."""
    block = torch.ones(1 << 28)
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        taken.append(time.perf_counter() - started)
    return block.nbytes / min(taken)


def told(what: str, unit: str, found: dict[str, list[float]], extra: str = "") -> None:
    names = list(found)
    medians = [statistics.median(found[name]) for name in names]
    spread = max((max(values) - min(values)) / statistics.median(values) for values in found.values())
    listed = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, medians, strict=True))
    print(f"{what} {unit}: {listed}, ratio {medians[0] / medians[1]:.2f}, spread {spread:.0%}{extra}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shared", type=int, default=512, help="tokens of the beginning that all share")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with folder_of(args.folder) as folder:
        compare(args, folder)


def compare(args: argparse.Namespace, folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    limits = {"start_batch": args.batch, "prefix_cache": False}

    def engine(**changes: object) -> Engine:
        table = {"dtype": args.dtype, "cache_bytes": 1 << 30, "scheduler": limits}
        return Engine.load(folder, EngineConfig.model_validate(table | changes))

    steady, loose = engine(), engine(batch_invariant=False)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    name = f"transformers {version('transformers')}"
    runs = {"lineshaft": ours(steady), name: theirs(peer), "lineshaft batch_invariant=false": ours(loose)}
    vocabulary = steady.model.config.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()

    def rounds(work: Callable[[Run, list[list[int]]], float], count: int, length: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {own: [] for own in runs}
        for repeat in range(args.repeats + 1):  # the first warms up
            asked = prompts(count, length)
            for own, run in runs.items():
                value = work(run, asked)
                if repeat:
                    found[own].append(value)
        return found

    weights = sum(tensor.nbytes for tensor in steady.model.state_dict().values())
    floor = weights / read_rate()
    print(f"weights {weights / 1e9:.2f} GB, read once in {floor * 1000:.1f} ms: at most {1 / floor:.1f} tokens/s alone", flush=True)

    def decoding(run: Run, asked: list[list[int]]) -> float:
        return (args.output - 1) / (seconds(run, asked, args.output) - seconds(run, asked, 1))

    def throughput(run: Run, asked: list[list[int]]) -> float:
        return len(asked) * args.output / seconds(run, asked, args.output)

    told(f"prefill of {args.prompt}", "tokens/s", rounds(lambda run, asked: args.prompt / seconds(run, asked, 1), 1, args.prompt))
    alone = rounds(decoding, 1, args.prompt)
    told("one stream", "tokens/s", alone, f", {statistics.median(alone['lineshaft']) * floor:.0%} of the floor reached")
    told(f"{args.batch} requests at once", "output tokens/s", rounds(throughput, args.batch, args.prompt))
    told_prefix(args, engine(scheduler={"start_batch": args.batch}), prompts)
    about = machine()
    print(f"torch {about['torch']}, {torch.get_num_threads()} threads, {about['processor']}, {args.dtype}")


def told_prefix(args: argparse.Namespace, engine: Engine, prompts: Callable[[int, int], list[list[int]]]) -> None:
    """Time to the first token of a prompt whose beginning is in the cache, and of one whose is not."""
    run, found = ours(engine), {"miss": [], "hit": []}
    for _ in range(args.repeats):
        (beginning,) = prompts(1, args.shared)
        ends = prompts(2, 32)
        found["miss"].append(seconds(run, [beginning + ends[0]], 1))
        found["hit"].append(seconds(run, [beginning + ends[1]], 1))
    told(f"first token after {args.shared} shared + 32 own tokens", "s", found)


if __name__ == "__main__":
    main()
