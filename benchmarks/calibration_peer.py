"""AWQ of a llama of random bf16 weights beside llm-compressor's: the same checkpoint folder, the same rows, one after the other.

    python3 -m venv PEER && PEER/bin/pip install llmcompressor==0.14.* torch==2.13.0
    .venv/bin/python benchmarks/calibration_peer.py --store FOLDER --peer PEER/bin/python [--layers 24] [--peer-dtype float32]

Each runs in a fresh process (calibration_contestants.py), INT4 in groups of 128, output projection dense, and is timed from the checkpoint
on disk to the compressed one. Memory is read from /proc ten times a second: `anonymous` (RssAnon) above what the imports took, and
`whole` (PSS: with mapped files, as far as they are in memory). llm-compressor is not made for processors: it multiplies in the dtype of the
model, and where the processor has no bf16 instructions PyTorch's bf16 products are ten times slower than float32's, so it gets float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import checkpoint_of, tokens_of

from lineshaft.base.config import load
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.calibrate.rows import calibration_rows
from lineshaft.compress.steps import STEPS
from lineshaft.model.folder import load_config

AWQ = STEPS["awq"]
MIB = 1 << 20


class Watch:
    """The most memory of a process, in bytes, while it runs."""

    def __init__(self, process: int) -> None:
        self.anonymous = self.whole = 0
        self._root, self._over = Path(f"/proc/{process}"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self, file: str, field: str) -> int:
        lines = (self._root / file).read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            try:
                self.anonymous = max(self.anonymous, self.now("status", "RssAnon"))
                self.whole = max(self.whole, self.now("smaps_rollup", "Pss"))
            except OSError:  # it has ended
                return

    def end(self) -> None:
        self._over.set()
        self._thread.join()


@dataclass(frozen=True)
class Run:
    """What one library took."""

    seconds: float
    anonymous: int
    """Bytes above those after the imports."""
    whole: int
    versions: dict[str, str]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.seconds:.0f} s, anonymous {self.anonymous / MIB:.0f} MiB, whole {self.whole / MIB:.0f} MiB ({told})"


def timed(python: str, name: str, options: dict[str, Any]) -> Run:
    """One library in a process of its own."""
    program = Path(__file__).with_name("calibration_contestants.py")
    env = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
    with subprocess.Popen([python, program, name, json.dumps(options)], stdout=subprocess.PIPE, text=True, env=env) as process:
        watch, told, before = Watch(process.pid), {}, 0
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(('{"ready"', '{"seconds"')):  # libraries print as well
                told |= json.loads(line)
                before = before or watch.now("status", "RssAnon")
        watch.end()
    if process.returncode or "seconds" not in told:
        sys.exit(f"{name} ended with {process.returncode}; what it said stands above")
    return Run(told["seconds"], watch.anonymous - before, watch.whole, told["ready"])


def rows_of(tokens: Artifact, checkpoint: Artifact, config: dict[str, Any]) -> list[list[int]]:
    """The calibration rows that our step takes."""
    found = calibration_rows(tokens, load(AWQ.config, config), load_config(checkpoint.root))
    return [row for around in found for row in around.batch.tokens_T.view(-1, around.batch.row).tolist()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--peer", help="a Python in which llmcompressor is installed; without it ours alone is timed")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def main() -> None:
    if platform.system() != "Linux":
        sys.exit("memory is read from /proc: run it on Linux")
    args = arguments()
    store = Store(args.store)
    tokens, tokenizer = tokens_of(store)
    checkpoint = checkpoint_of(store, tokenizer, args.layers)
    # Random weights answer at random; what four bits do to that is not the point here.
    config = {"sequences": args.sequences, "sequence_tokens": args.sequence_tokens, "proof_nats": 100.0}
    if (made := store.find(AWQ.request(load(AWQ.config, config), checkpoint=checkpoint, tokens=tokens).id)) is not None:
        shutil.rmtree(made.root)
    print(f"awq, {args.layers} layers, {args.sequences} x {args.sequence_tokens} tokens, {args.threads} threads; {json.dumps(machine())}")
    ids = {"store": str(args.store), "checkpoint": checkpoint.id, "tokens": tokens.id}
    ours = timed(sys.executable, "lineshaft", {"threads": args.threads, "config": config, **ids})
    print(f"ours: {ours}", flush=True)
    if args.peer is None:
        return
    with tempfile.TemporaryDirectory(dir=args.store) as folder:
        rows = Path(folder, "rows.json")
        rows.write_text(json.dumps(rows_of(tokens, checkpoint, config)))
        given = {"threads": args.threads, "dtype": args.peer_dtype, "folder": str(checkpoint.root), "rows": str(rows)}
        theirs = timed(args.peer, "llmcompressor", given | {"out": str(Path(folder, "out"))})
    print(f"llm-compressor, {args.peer_dtype}: {theirs}")
    share = (ours.seconds / theirs.seconds, ours.anonymous / theirs.anonymous, ours.whole / theirs.whole)
    print("ours / theirs: seconds {:.2f}, anonymous {:.2f}, whole {:.2f}".format(*share))


if __name__ == "__main__":
    main()
