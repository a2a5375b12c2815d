"""A whole line so small that it runs in seconds: a few made-up documents, two layers, twelve steps."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml

STEPS = ("data", "tokenizer", "tokens", "train", "compress", "evaluate_base", "evaluate_compressed", "serve")
WORDS = [
    "a",
    "model",
    "reads",
    "every",
    "document",
    "of",
    "this",
    "small",
    "corpus",
    "and",
    "learns",
    "which",
    "word",
    "comes",
    "next",
    "because",
    "training",
    "is",
    "nothing",
    "more",
    "than",
    "that",
    "one",
    "shaft",
    "turns",
    "all",
    "machines",
    "of",
    "the",
    "old",
    "factory",
    "through",
    "belts",
    "while",
    "the",
    "engine",
    "stands",
    "outside",
]

DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attention": {
        "kind": "mla",
        "num_attention_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
LLAMA: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attention": {"kind": "gqa", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}


def write_texts(folder: Path) -> Path:
    """Files of two kinds with documents that differ from each other; the same each time."""
    rng = random.Random(1)

    def text() -> str:
        return "\n".join(" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(4))

    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"note-{number:02}.txt").write_text(text())
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text()}) + "\n" for _ in range(60)))
    return folder


def recipe(texts: Path, model: dict[str, Any] = DEEPSEEK) -> dict[str, Any]:
    """The recipe as a table, free to change."""
    return {
        "name": "tiny",
        "data": {"source": str(texts), "heldout_share": 0.2},
        "tokenizer": {"vocab_size": 300},
        "train": {
            "sequence_tokens": 32,
            "rows": 2,
            "model": copy.deepcopy(model),
            "loop": {"steps": 12, "save_every": 4, "log_every": 2, "precision": "float32"},
        },
        "compress": {},
        "evaluate": {
            "sequence_tokens": 32,
            "max_tokens": 400,
            "speed": {"prompt_tokens": 8, "output_tokens": 4, "requests": 2, "batch": 2},
            "generate": {"prompts": 4, "prompt_tokens": 8, "output_tokens": 8},
        },
        "serve": {"prompt": "The model", "max_tokens": 8},
    }


def write_recipe(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(table))
    return path


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "lineshaft.cli.main", *map(str, args)]


def environment() -> dict[str, str]:
    """One thread, no colours, 100 columns, and no store that the person who runs the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if name != "LINESHAFT_STORE"}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def lineshaft(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, from the interpreter on."""
    return subprocess.run(command(*args), capture_output=True, text=True, env=environment(), timeout=280, check=False)


def begun(*args: str | Path) -> forked.Command:
    """The command line in a process of its own, with the imports behind it."""
    return forked.Command([*map(str, args)], environment())


@dataclass(frozen=True)
class Line:
    """A line that was run once, undisturbed, by the command line."""

    texts: Path
    recipe: Path
    store: Path
    said: str
    """What it wrote to stderr."""
    outcome: dict[str, Any]
    """What it printed with --json."""

    def digests(self) -> dict[str, str]:
        return digests(self.outcome)

    def id(self, step: str) -> str:
        return next(stage["id"] for stage in self.outcome["stages"] if stage["name"] == step)

    def copy(self, store: Path) -> Path:
        """Its store once more, to be broken or added to."""
        shutil.copytree(self.store, store)
        return store


def digests(outcome: dict[str, Any]) -> dict[str, str]:
    """Step to artifact id and digest."""
    return {stage["name"]: f"{stage['id']} {stage['digest']}" for stage in outcome["stages"]}


_FINISHED: list[Line] = []


def finished_line(factory: pytest.TempPathFactory) -> Line:
    """Made once for all tests that ask for it, those of the command line too, in whichever process of the suite they are."""
    if not _FINISHED:
        root = factory.getbasetemp()
        _FINISHED.append(_shared_line(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root))
    return _FINISHED[0]


def _shared_line(root: Path) -> Line:
    told = root / "line.json"
    with (root / "line.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if told.exists():
            known = json.loads(told.read_text())
            return Line(*(Path(known[name]) for name in ("texts", "recipe", "store")), known["said"], known["outcome"])
        line = _run_line(Path(tempfile.mkdtemp(prefix="line-", dir=root)))
        told.write_text(json.dumps(dataclasses.asdict(line), default=str))
    return line


def _run_line(folder: Path) -> Line:
    texts = write_texts(folder / "texts")
    path, store = write_recipe(folder / "tiny.yaml", recipe(texts)), folder / "store"
    done = lineshaft("run", path, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    return Line(texts, path, store, done.stderr, json.loads(done.stdout))
