"""Cold start: from exec of `lineshaft serve` to a green /ready and to the first token, weights read from disk and once more.

    .venv/bin/python benchmarks/cold_start.py [--repeats 3] [--keep FOLDER]

Two Llamas with random weights, half a billion parameters in bfloat16 and a tiny one, in a temporary folder (or in --keep, where
they are found again). First start: the kernel is asked to forget the weights' pages. Second: they are still in memory. Beside it
the floor: a Python that imports torch and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lineshaft.base.machine import machine
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder

VOCABULARY = 32000
SHAPES = {"0.5B": (1280, 3584, 24, 20, 10, 64), "tiny": (64, 128, 2, 4, 2, 16)}
"""hidden, intermediate, layers, heads, heads of keys and values, width of a head"""


def write_tokenizer(folder: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (path.read_text("utf-8", "ignore") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_model(folder: Path, name: str) -> None:
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    hidden, inner, layers, heads, groups, width = SHAPES[name]
    shape = ModelConfig(
        family="llama", hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, max_position_embeddings=4096,
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_ids=[1], tie_word_embeddings=False,
        attention=GroupedQueryAttention(kind="gqa", num_attention_heads=heads, num_key_value_heads=groups, head_dim=width),
    )  # fmt: skip
    model = Decoder(shape)
    model.initialise(0)
    save_checkpoint(model.to(torch.bfloat16), folder, folder)


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def start(folder: Path) -> dict[str, float]:
    """Seconds from exec until it listens, until /ready is green, until the first token; and what the engine's process told of itself."""
    began = time.monotonic()
    command = [sys.executable, "-m", "lineshaft.cli.start", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        url = next(found[1] for line in server.stderr if (found := re.match(r"listening on (\S+)", line)))
        listening = time.monotonic() - began
        while not green(f"{url}/ready"):
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.005)
        ready = time.monotonic() - began
        body = {"model": folder.name, "prompt": "Return the", "max_tokens": 2, "stream": True, "ignore_eos": True}
        ask = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(ask) as answer:
            answer.readline()
            first = time.monotonic() - began
            answer.read()
        server.terminate()
        told = server.stderr.read()
    found = re.search(r"loaded in ([\d.]+) s, warm ([\d.]+) s later", told)
    assert found, told
    return {"listening": listening, "ready": ready, "token": first, "load": float(found[1]), "warm": float(found[2])}


def green(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:  # an HTTP error is one as well
        return False


def importing() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        floor = statistics.median(importing() for _ in range(args.repeats))
        about = machine()
        for name in SHAPES:
            write_model(root / name, name)
            runs: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
            for _ in range(args.repeats):
                forget(root / name)
                for which in runs:
                    runs[which].append(start(root / name))
            shown = []
            for which, found in runs.items():
                middle = {key: statistics.median(run[key] for run in found) for key in found[0]}
                spread = (max(run["ready"] for run in found) - min(run["ready"] for run in found)) / middle["ready"]
                shown.append(
                    f"{which} start ready {middle['ready']:.2f} s, first token {middle['token']:.2f} s "
                    f"(listening {middle['listening']:.2f}, "
                    f"load {middle['load']:.1f}, warm-up {middle['warm']:.1f}; spread {spread:.0%})"
                )
            print(
                f"cold start {name}: {'; '.join(shown)}; importing torch alone {floor:.2f} s; torch {about['torch']}, "
                f"Python {about['python']}, {about['cores']} cores, {about['processor']}"
            )


if __name__ == "__main__":
    main()
