"""Progress: plain lines where nobody can see a bar, always on stderr."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest

from lineshaft.base import terminal

SCRIPT = """
from lineshaft.base.terminal import bar, say
say("model [bold]:x:[/bold] is ready")
with bar("train", 3) as progress:
    for step in range(3):
        progress.advance(note=f"loss {step}")
print("result")
"""


def test_plain_lines_go_to_stderr_and_only_results_to_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert done.stderr.splitlines() == ["model [bold]:x:[/bold] is ready", "train: 3/3 loss 2 (0 s)"]


def test_on_a_terminal_there_is_a_bar_and_stdout_stays_clean() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how Linux ends a pseudo-terminal
        os.close(ours)
    assert done.stdout == "result\n"
    assert b"3/3" in shown
    assert b"\x1b[" in shown


def test_a_plain_bar_counts_earlier_steps_and_guesses_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic() + 0.1  # the bar takes its start from the real clock
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.bar("train", 100, done=50) as progress:
        for _ in range(10):
            now += 1.0
            progress.advance(2, "loss 3.1")
    assert capsys.readouterr().err.splitlines() == [
        "train: 60/100 loss 3.1 (5 s, 20 s left)",
        "train: 70/100 loss 3.1 (10 s, 15 s left)",
        "train: 70/100 loss 3.1 (10 s, 15 s left)",
    ]


def test_a_bar_of_unknown_length_says_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.bar("read", None) as progress:
        progress.advance(7)
    assert capsys.readouterr().err == "read: 7  (0 s)\n"


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("x" * 500)
    assert capsys.readouterr().err == "x" * 500 + "\n"
