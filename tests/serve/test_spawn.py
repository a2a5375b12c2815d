"""The engine's process, started ahead of its orders."""

import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from lineshaft.base.errors import EngineError
from lineshaft.serve import spawn
from lineshaft.serve.frames import Failed, Frames, Orders, ToServer, framed


def test_the_process_started_ahead_is_given_once_and_the_next_one_is_new(monkeypatch):
    made = spawn.spawn
    monkeypatch.setattr(spawn, "spawn", lambda command: made([sys.executable, "-c", "import sys; sys.stdin.read()"]))
    spawn.spawn_ahead("some/checkpoint")
    first, second = spawn.taken("some/checkpoint"), spawn.taken("some/checkpoint")
    assert first.process.pid != second.process.pid
    for spawned in (first, second):
        assert spawned.process.poll() is None
        spawned.connection.close()
        assert spawned.process.wait(20) == 0  # it ends with its connection


def test_what_fails_ahead_is_told_when_the_process_is_taken(monkeypatch):
    def refused(command):
        raise EngineError("no more processes")

    monkeypatch.setattr(spawn, "spawn", refused)
    spawn.spawn_ahead("some/checkpoint")
    with pytest.raises(EngineError, match="no more processes"):
        spawn.taken("some/checkpoint")


def test_it_ends_with_a_server_that_dies_before_it_gives_orders():
    """As after a wrong option of `lineshaft serve`: the command ends while its engine's process still imports torch."""
    server = "from lineshaft.serve.spawn import spawn; print(spawn().process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    told = subprocess.run([sys.executable, "-c", server], check=False, stdout=subprocess.PIPE, timeout=60)
    assert told.returncode == -signal.SIGKILL
    try:
        descriptor = os.pidfd_open(int(told.stdout))
    except ProcessLookupError:  # it has ended already
        return
    with open(descriptor) as process:
        assert select.select([process], [], [], 30)[0]


def test_orders_are_carried_out_after_the_imports(tmp_path):
    spawned, frames = spawn.spawn(), Frames(ToServer)
    with spawned.process, spawned.connection as connection:
        connection.sendall(framed(Orders(str(tmp_path), {}, os.getpid())))
        while (told := frames.next()) is None:
            frames.feed(connection.recv(1 << 16))
    assert isinstance(told, Failed)
    assert "config.json" in told.message


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_it_ends_without_a_word_of_its_libraries_when_the_server_goes_while_it_imports_them(seconds):
    """Some register what is to be done at the end, and raise where the end has begun."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(spawn.COMMAND, stdin=theirs.fileno(), stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    ours.close()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "Traceback" not in told
