"""`kill -9` in the middle of every stage of a real run, in a process of its own.

One store goes through it all: the run is killed in its first stage, the next run in its second, and so on; the last one
ends undisturbed. What it ends with must be what an undisturbed run made in another store.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import uuid
from pathlib import Path

import forked
import pytest
from tiny_line import Line, begun, digests, environment

MARK = "LINESHAFT_TEST_MARK"
PATIENCE_S = 120.0


class Run:
    """A run in a process of its own. The processes that it starts carry a mark, so that those it leaves behind can be found."""

    def __init__(self, line: Line, store: Path) -> None:
        self.mark = uuid.uuid4().hex
        call = ["run", str(line.recipe), "--store", str(store)]
        reading, writing = os.pipe()
        with Path(os.devnull).open("w") as out, os.fdopen(writing, "w") as err:
            self.child = forked.start(call, environment() | {MARK: self.mark}, out, err)
        self.stderr = os.fdopen(reading)

    def until_it_says(self, words: str) -> None:
        said = []
        for line in self.stderr:
            said.append(line)
            if words in line:
                return
        raise AssertionError("".join(said))

    def until_there_is(self, folder: Path, pattern: str) -> None:
        for _ in patiently():
            if self.child.exitcode is not None or any(folder.glob(pattern)):
                return

    def kill(self) -> None:
        """Kill the run itself, as the system does when memory runs out; nobody tells its children."""
        self.child.kill()
        self.child.join()
        self.stderr.close()

    def left_behind(self) -> list[int]:
        """Processes that this run started and that live."""
        needle, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if needle in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:  # it ended, or is not ours
                    continue
        return found


def patiently():
    """Turns of a loop that waits for another process; a failure when nothing happens for two minutes."""
    end = time.monotonic() + PATIENCE_S
    for turn in itertools.count():
        yield turn
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def killed_in(line: Line, store: Path, step: str, words: str, pattern: str) -> bool:
    """Kill a run once the step has begun, said `words`, and its work folder holds `pattern`; whether that was before its end."""
    run = Run(line, store)
    run.until_it_says(f"{step}: {line.id(step)}")
    if words:
        run.until_it_says(words)
    run.until_there_is(store / "work" / line.id(step), pattern)
    run.kill()
    for _ in patiently():
        if not run.left_behind():
            break
    return not (store / "artifacts" / line.id(step)).exists()


MOMENTS = (
    ("data", "", "payload"),
    ("tokenizer", "", "payload"),
    ("tokens", "", "payload"),
    ("train", "", "payload"),
    ("train", "", "scratch/step-*"),
    ("compress", "", "payload"),
    ("evaluate_base", "", "payload"),
    ("evaluate_compressed", "score: ", "payload"),  # then its speed is measured, by a process of its own
    ("serve", "ready in", "payload"),
)
"""Step, what it must have said, and what must lie in its work folder."""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes that are left behind are looked for in /proc")
def test_a_line_killed_in_every_stage_ends_with_the_digests_of_an_undisturbed_one(line: Line, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for step, words, pattern in MOMENTS:
        for _ in range(5):  # a step of a tenth of a second may end before a busy machine delivers the kill
            if killed_in(line, store, step, words, pattern):
                break
            shutil.rmtree(store / "artifacts" / line.id(step))
        else:
            raise AssertionError(f"{step} always ended before it was killed")
        if pattern.startswith("scratch"):
            assert list((store / "work" / line.id(step)).glob(pattern))
    status, told, said = begun("run", line.recipe, "--store", store, "--json").ended()
    assert status == 0, said
    assert digests(json.loads(told)) == line.digests()
    assert not list((store / "work").iterdir())
