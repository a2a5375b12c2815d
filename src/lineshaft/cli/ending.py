"""The one place where our errors become messages and exit codes."""

from __future__ import annotations

import os
import sys

import typer

from lineshaft.base.errors import LineshaftError
from lineshaft.base.terminal import say
from lineshaft.cli.options import INTERRUPTED, ToldStop


def run_app(app: typer.Typer) -> None:
    """Carry out the command line. Our errors end with their message and code; anything else is a defect of ours and shows its traceback."""
    try:
        try:
            app(prog_name="lineshaft")
        finally:
            sys.stdout.flush()  # here and not at the interpreter's end, where nobody could catch what goes wrong
    except LineshaftError as error:
        say(f"lineshaft: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED and not isinstance(end, ToldStop):
            say("lineshaft: stopped; what was finished is kept, and the same command goes on from there")
        raise
