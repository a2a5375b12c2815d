"""Cold start: from exec of `lineshaft serve` to a green /ready and to the first token.

    .venv/bin/python benchmarks/cold_start.py [--repeats 3] [--keep FOLDER] [--int8]

Two Llamas with random weights, half a billion parameters in bfloat16 and a tiny one, in a temporary folder (or in --keep, where
they are found again). First start: nothing is kept, and the kernel is asked to forget the weights' pages. Second: what the first one kept
is used, and the weights are still in memory. Anew: still in memory, but nothing kept (engine.keep_start=nothing). Beside it the floor of
a start anew: a Python that imports torch and ends. --int8: of the large one as `lineshaft compress` stores it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
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


def start(folder: Path, cache: Path, keep: str) -> dict[str, float]:
    """Seconds from exec until it listens, until /ready is green, until the first token. Waits for what it may keep."""
    began = time.monotonic()
    command = [sys.executable, "-m", "lineshaft.cli.start", "serve", str(folder), "--port", "0", "--set", f"engine.keep_start={keep}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LINESHAFT_CACHE": str(cache)}) as server:
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
        while keep != "nothing" and not kept(cache):
            time.sleep(0.1)
        server.terminate()
        told = server.stderr.read()
    return {"listening": listening, "ready": ready, "token": first, "kept": float("a start that was kept" in told)}


def kept(cache: Path) -> list[Path]:
    return list(cache.glob("starts/*/[!.]*/program.msgpack"))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--kept", choices=["weights", "program"], default="weights")
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        floor = statistics.median(importing() for _ in range(args.repeats))
        for name in SHAPES:
            write_model(root / name, name)
            folder = in_int8(root / name) if args.int8 and name == "0.5B" else root / name
            print(told(folder.name, measured(folder, args.repeats, Path(temporary) / "cache", args.kept), floor), flush=True)


def in_int8(folder: Path) -> Path:
    made = folder.with_name(f"{folder.name}-int8")
    if not made.exists():
        command = [sys.executable, "-m", "lineshaft.cli.start", "compress", str(folder), "--format", "int8", "--store", str(made / "store")]
        subprocess.run(command, check=True)
    return made


def measured(folder: Path, repeats: int, cache: Path, keep: str) -> dict[str, list[dict[str, float]]]:
    runs: dict[str, list[dict[str, float]]] = {"first": [], "second": [], "anew": []}
    for _ in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        forget(folder)
        for which, found in runs.items():
            own = cache.with_name("nothing") if which == "anew" else cache
            found.append(start(folder, own, keep="nothing" if which == "anew" else keep))
            assert found[-1]["kept"] == (which == "second"), which
    return runs


def told(name: str, runs: dict[str, list[dict[str, float]]], floor: float) -> str:
    shown, middles, about = [], {}, machine()
    for which, found in runs.items():
        middles[which] = middle = {key: statistics.median(run[key] for run in found) for key in found[0]}
        least, most = (limit(run["ready"] for run in found) for limit in (min, max))
        shown.append(
            f"{which} start ready {middle['ready']:.2f} s ({least:.2f} to {most:.2f}), first token {middle['token']:.2f} s, "
            f"listening {middle['listening']:.2f} s"
        )
    second, *others = (middles[which]["ready"] for which in ("second", "first", "anew"))
    return (
        f"cold start {name}: {'; '.join(shown)}; second / first {second / others[0]:.2f}, second / anew "
        f"{second / others[1]:.2f}; importing torch alone {floor:.2f} s; torch {about['torch']}, "
        f"Python {about['python']}, {about['cores']} cores, {about['processor']}"
    )


if __name__ == "__main__":
    main()
