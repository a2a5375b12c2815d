"""A command run inside this process."""

from __future__ import annotations

from pathlib import Path

from tiny_line import environment
from typer.testing import CliRunner

from lineshaft.base.errors import LineshaftError
from lineshaft.cli.main import app


def call(*args: str | Path) -> tuple[int, str]:
    """Exit code and stdout of a command run inside this process; for a refusal its code and message."""
    done = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="lineshaft", env=environment())
    if isinstance(done.exception, LineshaftError):
        return done.exception.exit_code, str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output if done.exit_code else done.stdout
