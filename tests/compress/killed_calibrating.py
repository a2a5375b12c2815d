"""A program that kills calibrated compression (SIGKILL) and runs it again.

    python killed_calibrating.py FOLDER

Killed just before each thing that a saving asks of the system (every seventh), and right after it. Prints digest and parts done of an
undisturbed run, and of each rerun. Each run is a fork, as in killed_training.py, whose helpers serve here (PYTHONPATH).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import calibrated_line
import torch
from killed_training import EVENTS, Countdown, in_a_fork

from lineshaft.compress.calibrate import kept

parts: list[int] = []
"""Those that this process saved."""
_save = kept.save


def _counted(folder: Path, number: int, *given: Any) -> None:
    _save(folder, number, *given)
    parts.append(number)


def work(folder: Path) -> list[Any]:
    """Digest of the checkpoint, and parts that this process did."""
    store = calibrated_line.Store(folder)
    found = {item.kind: store.open(item.id) for item in store.all()}
    made = calibrated_line.Line(store, found["checkpoint"], found["tokens"])
    return [made.compress("gptq", **calibrated_line.INT8).manifest.digest, len(parts)]


def trap(n: int) -> None:
    """Die at the n-th event while something is saved."""
    countdown = Countdown(n)
    sys.addaudithook(lambda event, _: countdown.event() if event in EVENTS else None)
    kept.save = countdown.during(_counted, lambda *_: True)


def main(folder: Path) -> None:
    """Kill until a run gets through, and run each again."""
    os.fsync = lambda _: None  # a kill loses nothing that the system holds
    answer = folder / "answer.json"
    torch.set_num_threads(1)
    kept.save = _counted
    calibrated_line.line(folder / "given", "llama")
    shutil.copytree(folder / "given", folder / "undisturbed")
    undisturbed = in_a_fork(lambda: work(folder / "undisturbed"), answer)
    reruns = []
    for n in itertools.count(1, 7):
        here = shutil.copytree(folder / "given", folder / str(n))
        if in_a_fork(lambda: (trap(n), work(here)), answer) is not None:  # noqa: B023
            break
        reruns.append(in_a_fork(lambda: work(here), answer))  # noqa: B023
    print(json.dumps({"undisturbed": undisturbed, "reruns": reruns}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
