"""A program that kills pruning runs (SIGKILL) and runs them again.

    python killed_pruning.py FOLDER

Kills just before each thing that a run asks of the system while it keeps the model after its second cut, and in the midst of calibration,
cutting and recovery. Prints the digest of an undisturbed run, and for each kill where it was, how many cuts the run that followed made and
its digest. Each run but the undisturbed one is a fork, so that one start of Python serves them all; torch keeps to one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import letter_line
import torch
from killed_training import EVENTS, Countdown, in_a_fork

from lineshaft.compress import prune_stage
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.train import state
from lineshaft.train.objective import NextToken
from lineshaft.train.stage import PRETRAIN

CONFIG = PruneConfig(
    **{"channels": 0.5, "experts": 0.5, "multiple": 4, "step_share": 0.2, "calibration_rows": 2},
    **{"recovery_steps": 3, "last_recovery_steps": 3, "sequence_tokens": 16, "rows": 2, "precision": "float32"},
    **{"rebuild_steps": 3, "rebuild_rows": 4},
)

cuts: list[int] = []
"""The cuts that this process made."""
_plain_without = prune_stage.without
prune_stage.without = lambda *given: cuts.append(len(given[1])) or _plain_without(*given)


def run(folder: Path) -> list[Any]:
    """Cuts that this process made, and the digest of the checkpoint."""
    store, parents = letter_line.parents(folder)
    dense = PRETRAIN(store, letter_line.config(), **parents)
    before = len(cuts)
    made = prune_stage.PRUNE(store, CONFIG, checkpoint=dense, tokens=parents["tokens"])
    return [len(cuts) - before, made.manifest.digest]


def trap(where: str, n: int) -> None:
    countdown = Countdown(n)
    if where == "keep":
        sys.addaudithook(lambda event, _: countdown.event() if event in EVENTS else None)
        state.write = countdown.during(state.write, lambda folder, step, *_: folder.name == "cuts" and step == 2)
    else:  # calibration, cutting and recovery all ask for the loss
        NextToken.__call__ = countdown.during(NextToken.__call__, lambda *_: True)


def main(folder: Path) -> None:
    os.fsync = lambda _: None  # a kill loses nothing that the system holds
    torch.set_num_threads(1)
    answer = folder / "answer.json"
    store, parents = letter_line.parents(folder / "given")
    PRETRAIN(store, letter_line.config(), **parents)  # not what is to be killed
    undisturbed = run(shutil.copytree(folder / "given", folder / "undisturbed"))
    reruns = []
    for where, every in (("keep", 2), ("loss", 2)):
        for n in itertools.count(1, every):
            here = shutil.copytree(folder / "given", folder / f"{where}-{n}")
            if in_a_fork(lambda: (trap(where, n), run(here)), answer) is not None:  # noqa: B023
                break
            assert len(list((here / "artifacts").glob("checkpoint-*"))) == 1
            reruns.append([where, n, *in_a_fork(lambda: run(here), answer)])  # noqa: B023
    print(json.dumps({"undisturbed": undisturbed, "reruns": reruns}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
