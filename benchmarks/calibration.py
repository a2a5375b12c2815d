"""What a calibrated step takes on a llama of 0.5 B random weights in bf16: seconds, and memory that is not a file's.

    .venv/bin/python benchmarks/calibration.py --store FOLDER [--step awq] [--sequences 64] [--sequence-tokens 512] [--layers 24]

The text is the quickstart's. Memory is sampled from /proc (RssAnon: weights and finished parts are mapped from files, which the system can
drop at any time).
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress.steps import STEPS
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.pipeline.recipe import read_recipe

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SHAPE = {
    "family": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention": {"kind": "gqa", "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
}


def tokens_of(store: Store) -> tuple[Artifact, Artifact]:
    """The quickstart's tokens and tokenizer."""
    quick = read_recipe(QUICKSTART).recipe
    corpus = INGEST(store, quick.data)
    tokenizer = TRAIN_TOKENIZER(store, quick.tokenizer, corpus=corpus)
    return TOKENIZE(store, quick.tokens, corpus=corpus, tokenizer=tokenizer), tokenizer


def checkpoint_of(store: Store, tokenizer: Artifact, layers: int) -> Artifact:
    """Random weights, the same each time."""
    config = ModelConfig.model_validate(SHAPE | {"num_hidden_layers": layers})
    with store.draft("checkpoint", stage="benchmark", version=1, config={"layers": layers}, parents={"tokenizer": tokenizer}) as draft:
        if isinstance(draft, Draft):
            model = Decoder(config)
            model.initialise(1)
            save_checkpoint(model.to(torch.bfloat16), draft.root, tokenizer.root)
    (found,) = (item.id for item in store.all() if item.stage == "benchmark" and item.config == {"layers": layers})
    return store.open(found)


class Peak:
    """The most anonymous memory of this process while it is watched, in bytes."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        """Anonymous memory now."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, self.now())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    """Measure one step."""
    if platform.system() != "Linux":
        sys.exit("memory is read from /proc: run it on Linux")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--step", choices=("gptq", "awq", "smooth"), default="awq")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    store = Store(args.store)
    tokens, tokenizer = tokens_of(store)
    checkpoint = checkpoint_of(store, tokenizer, args.layers)
    stage = STEPS[args.step]
    # Random weights answer at random; what four bits do to that is not the point here.
    config = load(stage.config, {"sequences": args.sequences, "sequence_tokens": args.sequence_tokens, "proof_nats": 100.0})
    request = stage.request(config, checkpoint=checkpoint, tokens=tokens)
    if (made := store.find(request.id)) is not None:
        shutil.rmtree(made.root)
    before, started = Peak.now(), time.perf_counter()
    with Peak() as peak:
        request.carry_out(store)
    seconds = time.perf_counter() - started
    layer = 2 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096)
    hidden = 2 * 1024 * args.sequences * args.sequence_tokens
    versions = machine()
    print(f"{args.step}, {args.layers} layers, {args.sequences} x {args.sequence_tokens} tokens: {seconds:.0f} s, ", end="")
    print(f"anonymous memory {before / 2**20:.0f} MiB before, at most {(peak.bytes - before) / 2**20:.0f} MiB more; ", end="")
    print(f"a layer's weights {layer / 2**20:.0f} MiB, hidden states twice {2 * hidden / 2**20:.0f} MiB; {versions}")


if __name__ == "__main__":
    main()
