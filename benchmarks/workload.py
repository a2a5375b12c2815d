"""What engines are asked in the comparisons, and what the machine could do at most."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens."""

    prompt: int = 128
    output: int = 128
    long: int = 1024
    """Prompt of which only the reading counts."""
    requests: int = 16
    """At once, with lengths drawn from the two ranges below, the same in every run."""
    prompts: tuple[int, int] = (64, 512)
    outputs: tuple[int, int] = (64, 128)

    def batch(self) -> list[tuple[int, int]]:
        """Prompt and answer of each request."""
        draw = random.Random(self.requests)
        return [(draw.randint(*self.prompts), draw.randint(*self.outputs)) for _ in range(self.requests)]

    @property
    def context(self) -> int:
        return max(self.long, self.prompt + self.output, self.prompts[1] + self.outputs[1]) + 64


QUICK = Workload(prompt=32, output=16, long=128, requests=4, prompts=(16, 64), outputs=(8, 16))
"""Only shows that everything runs."""


def random_prompts(vocabulary: int, seed: int = 1) -> Callable[[int], list[int]]:
    """Prompts of random ids that never come twice. The lowest ids are left out: bytes and special tokens."""
    draw = random.Random(seed)
    low, high = min(300, vocabulary // 4), min(30000, vocabulary)
    return lambda length: [draw.randrange(low, high) for _ in range(length)]


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def precision_of(config: dict[str, Any]) -> str:
    """bf16, int8, int4 or what else config.json says of the weights. Dense weights run in bf16 whatever they are stored as."""
    found = config.get("quantization_config")
    if found is None:
        return "bf16"
    groups = found.get("config_groups", {}).values()
    bits = {(group["weights"]["type"], group["weights"]["num_bits"]) for group in groups}
    return "{}{}".format(*bits.pop()) if len(bits) == 1 else str(found.get("quant_method"))


def read_bytes(folder: Path, config: dict[str, Any]) -> int:
    """Bytes of weights that decoding a token reads: all but the embedding table, unless that is the output layer too.

    Of routed experts the share that a token uses. Dense float32 weights count as the bf16 that they run in.
    """
    used = config.get("num_experts_per_tok") or 1
    all_experts = next((config[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if config.get(key)), used)
    dense, total = "quantization_config" not in config, 0.0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name == "__metadata__" or ("embed_tokens" in name and not config.get("tie_word_embeddings")):
                continue
            first, last = about["data_offsets"]
            size = 2 * prod(about["shape"]) if dense and about["dtype"] == "F32" else last - first
            total += size * (used / all_experts if re.search(r"\.experts\.", name) else 1)
    return int(total)


def read_rate() -> float:
    """Bytes a second of one sum over 1 GiB, the best of five."""
    block = torch.ones(1 << 28)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        taken.append(time.perf_counter() - began)
    return block.nbytes / min(taken)
