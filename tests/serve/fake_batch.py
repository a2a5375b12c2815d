"""A batch run around a fake engine: `fake_batch.py IN OUT STEP_SECONDS` for one run;

`fake_batch.py IN FOLDER every` for a run that is killed (SIGKILL) just before the n-th thing it asks of the file system, in the middle of
it where that is a write, and then a run that may end, for n = 1, 2, 3, ... Run n makes FOLDER/n.jsonl. Prints the numbers of the killed
runs and, for each, how many requests were answered twice.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

from fake_engine import FakeEngine
from in_thread import in_thread

from lineshaft.serve.batch import BatchConfig, answer_file
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.worker import Worker

MODEL = "fake-1"


def answered(source, target, engine):
    """One run to its end."""

    def worker():
        return Worker(lambda: in_thread(lambda: engine), Metrics(MODEL), 64)

    return answer_file(worker, MODEL, source, target, BatchConfig(in_flight=4))


class Countdown:
    """Kills this process at the n-th step."""

    def __init__(self, n, folder):
        self.left, self.folder = n, str(folder)
        sys.addaudithook(self.see)
        self.write, os.write = os.write, self.torn
        sync = os.fsync
        os.fsync = lambda handle: self.step() or sync(handle)

    def see(self, event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.truncate") and str(arguments[0]).startswith(self.folder):
            self.step()

    def step(self, last_words=lambda: None):
        self.left -= 1
        if self.left == 0:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, handle, line):
        if len(line) > 40:  # asyncio writes as well, to wake itself up
            self.step(lambda: self.write(handle, line[: len(line) // 2]))
        return self.write(handle, line)


def killed(source, target, n):
    """Whether a child was killed at step n; False when it ended before that."""
    child = os.fork()
    if child == 0:
        Countdown(n, target.parent)
        answered(source, target, FakeEngine())
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit(f"run {n} failed by itself")
    return False


def main():
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3] != "every":
        answered(source, target, FakeEngine(step_seconds=float(sys.argv[3])))
        return
    twice = []
    for n in itertools.count(1):
        goal = target / f"{n}.jsonl"
        if not killed(source, goal, n):
            print(json.dumps(twice))
            return
        part = goal.with_name(f"{goal.name}.part")
        kept = part.read_bytes().count(b"\n") - 1 if part.exists() else 0
        again = FakeEngine()
        if not goal.exists() or part.exists():
            answered(source, goal, again)
            lines = source.read_bytes().count(b"\n")
            twice.append(len(again.submitted) - (lines - max(kept, 0)))


if __name__ == "__main__":
    main()
