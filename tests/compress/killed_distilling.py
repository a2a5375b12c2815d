"""A program that kills distillations (SIGKILL) in the middle of steps and runs them again.

    PYTHONPATH=tests/train python killed_distilling.py FOLDER

Prints the digest of an undisturbed run, and for each kill the digest that the rerun ended with and how many steps it had to do. Each
run but the undisturbed one is a fork; torch keeps to one thread, since a fork would not have the others.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import distilling
import letter_line
import torch
from killed_training import in_a_fork

from lineshaft.base.store import Artifact, Store
from lineshaft.compress.distil import Distil
from lineshaft.compress.distil_stage import DISTIL
from lineshaft.train.stage import PRETRAIN

CONFIG = distilling.config(steps=8, save_every=2, student=distilling.shape(1, 8), hidden_weight=0.5)
"""The widths differ, so maps are learnt as well."""

steps: list[int] = []
"""One entry a step that this process did."""
_plain_call = Distil.__call__


def line(folder: Path) -> tuple[Store, dict[str, Artifact]]:
    """A store with tokens and a teacher."""
    store, parents = letter_line.parents(folder)
    teacher = PRETRAIN(store, letter_line.config(steps=4, save_every=4), **parents)
    return store, {"checkpoint": teacher, "tokens": parents["tokens"]}


def distil(folder: Path, kill_at: int = 0) -> list[Any]:
    """Digest of the student, and the steps that this took."""

    def counted(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return _plain_call(*args)

    Distil.__call__ = counted  # type: ignore[method-assign]  # counts, and kills
    steps.clear()
    store, parents = line(folder)
    return [DISTIL(store, CONFIG, **parents).manifest.digest, len(steps)]


def main(folder: Path) -> None:
    """Kill in steps 2, 4 and 8, and run each again."""
    torch.set_num_threads(1)
    line(folder / "given")
    undisturbed, reruns = distil(shutil.copytree(folder / "given", folder / "undisturbed")), []
    for step in (2, 4, 8):
        here = shutil.copytree(folder / "given", folder / str(step))
        assert in_a_fork(lambda: distil(here, step), folder / "answer") is None  # noqa: B023
        reruns.append(in_a_fork(lambda: distil(here), folder / "answer"))  # noqa: B023
    print(json.dumps({"undisturbed": undisturbed, "reruns": reruns}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
