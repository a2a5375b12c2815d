"""`lineshaft` commands in processes of their own that are forked from one which has imported everything.

The imports take seconds, most of them torch's: here once, and not for each command. What is forked has run nothing yet. It has
its own session, standard streams, environment and folder, can be killed like any other process, and starts its children as usual.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lineshaft.cli.main"])


def start(args: list[str], environment: dict[str, str], out: IO[str], err: IO[str]) -> BaseProcess:
    """A command that writes into these files."""
    streams = [Connection(os.dup(file.fileno()), readable=False) for file in (out, err)]  # which can be handed over
    process = _CONTEXT.Process(target=_run, args=(args, environment, os.getcwd(), streams))
    process.start()
    for stream in streams:
        stream.close()
    return process


@contextmanager
def heard(args: list[str], environment: dict[str, str]) -> Iterator[tuple[BaseProcess, IO[str]]]:
    """A command, and what it says on stderr as it says it; it is killed where it has not ended by itself."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as said, Path(os.devnull).open("w") as out:
        with os.fdopen(writing, "w") as err:
            process = start(args, environment, out, err)
        try:
            yield process, said
        finally:
            process.kill()
            process.join()


class Command:
    """A command that runs to its end."""

    def __init__(self, args: list[str], environment: dict[str, str]) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  # closed when it has ended
        self._process = start(args, environment, *self._files)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ended(self, timeout: float = 280) -> tuple[int, str, str]:
        """Its exit status, stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
        told = []
        for file in self._files:
            file.seek(0)
            told.append(file.read())
            file.close()
        assert self._process.exitcode is not None, f"it did not end: {told}"
        return self._process.exitcode, *told


def _run(args: list[str], environment: dict[str, str], folder: str, streams: list[Connection]) -> None:
    from lineshaft.cli import main  # no time in the fork; and this module is imported by tests that need nothing of it

    os.setsid()
    os.chdir(Path(folder))
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["lineshaft", *args]
    main.main()
