"""Engines side by side: each in a process of its own that stands still unless it is asked. Used by engine.py and waterfall.py.

Options         what a contestant is told when it starts
Contestant      its process: started, asked, stopped (SIGSTOP) in between, so that no idle pool of threads takes a core from the next
Contest         asks them in turns, takes disturbed samples again, keeps all samples
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lineshaft.base.machine import available_memory_bytes, machine

CHILD = Path(__file__).with_name("contestants.py")
DISTURBED = 0.08
"""Share of the machine that others may use while a sample is taken."""
ROUNDING_SECONDS = 0.03
"""The system counts in ticks of 10 ms, in several counters; so much of others is nothing."""
AGAIN = 2
"""Times that a disturbed sample is taken again."""
BESIDE_BYTES = 1 << 30
"""What an engine was seen to take beside its weights and its cache, roughly: libraries, buffers, compiled code."""


class Failed(Exception):
    """A contestant that can't start or did not answer, with what it wrote."""


@dataclass(frozen=True)
class Options:
    """What a contestant needs to know."""

    folder: str
    """Or the file, for a peer that reads one."""
    dtype: str | None
    """Of dense weights; None: as they are stored."""
    threads: int
    cache_gib: int
    context: int
    """Longest prompt and answer together."""
    requests: int
    """Most at once."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Settings of our engine."""
    program: str = ""
    """A server to start, where the peer is one."""


@dataclass(frozen=True)
class Sample:
    """One answered workload."""

    figure: str
    round: int
    contestant: str
    seconds: float
    others: float
    """Share of the machine that other processes used meanwhile."""

    @property
    def disturbed(self) -> bool:
        return self.others > DISTURBED


@dataclass
class Contestant:
    """One engine. `kind` names a class of contestants.py."""

    name: str
    kind: str
    interpreter: str
    options: Options
    environment: dict[str, str] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    """What it said when it was ready: seconds, versions, about."""

    def __post_init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 # lives as long as the process
        self.process: subprocess.Popen[str] | None = None

    def check(self) -> None:
        """Are the engine and what it is to read there? Takes no time, so it is asked of all before the first is loaded. Raises Failed."""
        if not Path(self.options.folder).exists():
            raise Failed(f"{self.name}: there is no {self.options.folder}")
        self._spawn(only_try=True)
        self._close()

    def start(self) -> None:
        """Load, then stand still. Raises Failed."""
        path = Path(self.options.folder)
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in {".safetensors", ".bin"}]
        for file in files:
            read_once(file)
        need = sum(file.stat().st_size for file in files) * 3 // 2 + (self.options.cache_gib << 30) + BESIDE_BYTES
        if need > (left := available_memory_bytes()):
            raise Failed(
                f"{self.name}: needs about {need / 2**30:.1f} GiB, {left / 2**30:.1f} are left beside the others: "
                "name fewer peers in one run, or lower --cache-gib"
            )
        self.told = self._spawn()
        self._stand_still()

    def ask(self, prompts: list[list[int]], outputs: list[int], mode: dict[str, Any]) -> tuple[float, float]:
        """Seconds, and the share of the machine that other processes used meanwhile. Raises Failed."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        short = [prompts[0][: min(16, len(prompts[0]))]]
        self._exchange(prompts=short, outputs=[2], mode=mode)  # wakes threads and fills caches that the others emptied
        began, before = time.perf_counter(), others_seconds(self.process.pid)
        taken = self._exchange(prompts=prompts, outputs=outputs, mode=mode)["seconds"]
        wall, others = time.perf_counter() - began, others_seconds(self.process.pid) - before
        self._stand_still()
        return taken, max(0.0, others - ROUNDING_SECONDS) / (wall * (os.cpu_count() or 1))

    def end(self) -> None:
        """Whatever it does now."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # reaches a process that stands still as well
        self._close()

    def _close(self) -> None:
        if self.process is not None:
            self.process.communicate()
        self.process = None

    def _stand_still(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _spawn(self, **more: Any) -> dict[str, Any]:
        options = json.dumps(asdict(self.options) | more)
        threads = {"OMP_NUM_THREADS": str(self.options.threads)}
        try:
            self.process = subprocess.Popen(
                [self.interpreter, str(CHILD), self.kind, options], env=os.environ | threads | self.environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Failed(f"{self.name}: can't run {self.interpreter}: {error.strerror}") from error
        told = self._read()
        if "missing" in told:
            raise Failed(f"{self.name}: {told['missing']}")
        return told

    def _exchange(self, **asked: Any) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading tells how
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self._log.seek(0)
        said = "".join(self._log.readlines()[-25:])
        why = "was killed, perhaps for want of memory" if code == -signal.SIGKILL else f"ended with {code}"
        raise Failed(f"{self.name} {why}. The end of what it wrote:\n{said}")


def read_once(path: Path) -> None:
    """So that nobody's loading waits for the disk on behalf of those that come after it."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def others_seconds(group: int) -> float:
    """Processor seconds so far of the whole machine, what a hypervisor took included, less those of a process group. 0 without /proc."""
    table = Path("/proc/stat")
    if not table.exists():
        return 0.0
    ticks = [int(number) for number in table.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, and waiting for a disk
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            busy -= sum(int(number) for number in fields[11:15])  # its own and those of children that ended
    return busy / os.sysconf("SC_CLK_TCK")


class Contest:
    """Contestants and everything that was measured of them. A context: on leaving no process is left."""

    def __init__(self, contestants: list[Contestant], prompts: Callable[[int], list[int]], needed: str | None = None) -> None:
        """`prompts`: new random ids, so many. `needed`: without whom all ends, since nothing is left to compare with."""
        self.contestants, self.prompts, self.needed = contestants, prompts, needed
        self.samples: list[Sample] = []
        self.failures: list[str] = []

    def __enter__(self) -> Contest:
        """Check that all are there, or end; then load one after another: whoever fails at that is told and left out."""
        for contestant in list(self.contestants):
            self._guarded(contestant, Contestant.check)
        if self.failures:
            raise SystemExit(1)
        try:
            for contestant in list(self.contestants):
                print(f"loading {contestant.name}", file=sys.stderr, flush=True)
                self._guarded(contestant, Contestant.start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for contestant in self.contestants:
            contestant.end()

    def round(self, number: int, figure: str, lengths: list[tuple[int, int]], names: Collection[str], **mode: Any) -> None:
        """One figure of one round, contestant after contestant, with the same prompts. Round 0 warms up and is not kept.

        `mode`: how they answer; see `timed` in contestants.py.
        """
        asked, outputs = [self.prompts(length) for length, _ in lengths], [output for _, output in lengths]
        for contestant in [one for one in self.contestants if one.name in names]:
            self._guarded(contestant, lambda one: self._sample(one, number, figure, asked, outputs, mode))

    def values(self, figure: str, contestant: str) -> list[Sample]:
        return [sample for sample in self.samples if (sample.figure, sample.contestant) == (figure, contestant)]

    def record(self, file: Path, **about: Any) -> None:
        """Everything that was measured."""
        told = {one.name: one.told for one in self.contestants}
        samples = [asdict(sample) for sample in self.samples]
        whole = {"machine": machine(), **about, "failures": self.failures, "contestants": told, "samples": samples}
        file.write_text(json.dumps(whole, indent=1) + "\n")

    def versions(self) -> str:
        """Of all; where two interpreters differ, both."""
        found = (f"{package} {version}" for one in self.contestants for package, version in one.told["versions"].items())
        return ", ".join(dict.fromkeys(found))

    def disturbance(self) -> str | None:
        """For people; None when nothing disturbed."""
        count = sum(sample.disturbed for sample in self.samples)
        return f"* {count} of {len(self.samples)} samples: others used over {DISTURBED:.0%} of the machine" if count else None

    def _sample(
        self, contestant: Contestant, number: int, figure: str, prompts: list[list[int]], outputs: list[int], mode: dict[str, Any]
    ) -> None:
        taken: list[Sample] = []
        for _ in range(1 + AGAIN if number else 1):
            taken.append(Sample(figure, number, contestant.name, *contestant.ask(prompts, outputs, mode)))
            if not taken[-1].disturbed:
                break
            prompts = [self.prompts(len(prompt)) for prompt in prompts]  # new ones: nobody's prefix cache may help
        if number:
            self.samples.append(min(taken, key=lambda sample: sample.others))

    def _guarded(self, contestant: Contestant, act: Callable[[Contestant], None]) -> None:
        try:
            act(contestant)
        except Failed as error:
            self.failures.append(str(error))
            print(f"FAILED {error}", file=sys.stderr, flush=True)
            contestant.end()
            self.contestants.remove(contestant)
            if contestant.name == self.needed:
                raise SystemExit(1) from error


@dataclass(frozen=True)
class Figure:
    """Several samples of one thing, in its unit."""

    values: list[float]
    disturbed: bool

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest less smallest, of the median."""
        return (max(self.values) - min(self.values)) / self.median

    def told(self) -> str:
        spread = f" (spread {self.spread:.0%})" if len(self.values) > 1 else " (once)"
        return f"{self.median:.3g}{'*' if self.disturbed else ''}{spread}"
