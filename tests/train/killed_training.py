"""A program that kills training runs (SIGKILL) and runs them again.

    python killed_training.py FOLDER

`step`: in the middle of some steps. `save`: just before each thing that the third saving of a state asks of the system.
`checkpoint`: the same while the finished model is written, every fourth. Prints the digest of an undisturbed run, and for
each of the three and each kill the digest that the rerun ended with and how many of the 8 steps it had to do.
Each run but the undisturbed one is a fork, so that one start of Python serves them all; torch keeps to one thread, since
a fork would not have the others.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letter_line
import torch

from lineshaft.train import loop, stage, state
from lineshaft.train.objective import NextToken

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}
CONFIG = letter_line.config(steps=8, save_every=2)

steps: list[int] = []
"""The steps that this process did."""
_plain_step = loop._step
loop._step = lambda *args: steps.append(args[-1]) or _plain_step(*args)


def train(folder: Path) -> list[Any]:
    """Digest of the checkpoint, and steps that this process did."""
    store, parents = letter_line.parents(folder)
    done = len(steps)
    return [stage.PRETRAIN(store, CONFIG, **parents).manifest.digest, len(steps) - done]


class Countdown:
    """Kills this process at the n-th event while it is armed."""

    def __init__(self, n: int) -> None:
        self.left, self.armed = n, False

    def event(self) -> None:
        self.left -= self.armed
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def during(self, call: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self.armed = when(*args)
            result = call(*args)
            self.event()  # and right after it
            self.armed = False
            return result

        return watched


def trap(where: str, n: int) -> None:
    countdown = Countdown(n)
    sys.addaudithook(lambda event, _: countdown.event() if event in EVENTS else None)
    if where == "save":
        state.save = countdown.during(state.save, lambda _folder, step, *_: step == 6)
    elif where == "checkpoint":
        stage.save_checkpoint = countdown.during(stage.save_checkpoint, lambda *_: True)
    else:
        NextToken.__call__ = countdown.during(NextToken.__call__, lambda *_: True)


def in_a_fork(work: Callable[[], object], answer: Path) -> Any:
    """What `work` returned in a child process, or None when that was killed."""
    child = os.fork()
    if child == 0:
        answer.write_text(json.dumps(work()))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        sys.exit("a run failed by itself")
    return json.loads(answer.read_text())


STRIDES = {"step": 3, "save": 1, "checkpoint": 4}


def reruns(folder: Path, where: str) -> list[Any]:
    """Kill until a run gets through, and run each again."""
    answer, ended = folder / "answer.json", []
    for n in itertools.count(1, STRIDES[where]):
        here = folder / where / str(n)
        if in_a_fork(lambda: (trap(where, n), train(here)), answer) is not None:  # noqa: B023
            return ended
        assert not list((here / "artifacts").glob("checkpoint-*"))
        ended.append(in_a_fork(lambda: train(here), answer))  # noqa: B023
    raise AssertionError("it counts for ever")


def main(folder: Path) -> None:
    os.fsync = lambda _: None  # a kill loses nothing that the system holds
    torch.set_num_threads(1)
    undisturbed = train(folder / "undisturbed")
    print(json.dumps({"undisturbed": undisturbed, **{where: reruns(folder, where) for where in STRIDES}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
