"""The engine's process, started: ahead of time by a command that will need it, since it may import torch for about a second.

Imports nothing heavy itself.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lineshaft.base.errors import EngineError

COMMAND = (sys.executable, "-m", "lineshaft.serve.child")


@dataclass
class Spawned:
    """A process that waits for orders (serve/frames.Orders) at the other end of `connection`, which is its stdin."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


_ahead: Spawned | None = None


def spawn(command: Sequence[str] = COMMAND) -> Spawned:
    """Start one, in this thread: it ends with the thread that started it (PR_SET_PDEATHSIG). Raises EngineError when that can't be."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module; it returns within milliseconds
                command,
                stdin=theirs.fileno(),
                stdout=2,  # what a library may print belongs to the log; our stdout may be what a parent reads
                process_group=0,  # Ctrl-C in a terminal is for the server alone, which drains
            )
        except OSError as error:
            ours.close()
            raise EngineError(f"the engine process could not be started: {error}") from None
    return Spawned(process, ours)


def spawn_ahead(checkpoint: str) -> None:
    """Start the process that `taken` will give, while there is still something else to do. To be called once, in the main thread.

    `checkpoint`: as it was named, for a guess at what to import. Where that fails `taken` tries again, and its error is told.
    """
    global _ahead  # noqa: PLW0603 # of this process
    with suppress(EngineError):
        _ahead = spawn([*COMMAND, checkpoint])


def taken(checkpoint: str) -> Spawned:
    """The process started ahead, once; after that, and without it, a new one. Raises EngineError as `spawn` does."""
    global _ahead  # given away
    found, _ahead = _ahead, None
    return found or spawn([*COMMAND, checkpoint])
