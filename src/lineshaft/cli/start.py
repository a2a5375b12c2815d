"""The `lineshaft` command. `serve` takes a short way that loads neither torch nor the other commands, so that it listens at once."""

from __future__ import annotations

import sys

import typer

from lineshaft.cli import serving
from lineshaft.cli.ending import run_app

short = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
short.command(name="serve")(serving.serve)


@short.callback()
def lineshaft() -> None:
    """A language model's whole life, from raw documents to an answering service."""


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["serve"]:
        run_app(short)
        return
    from lineshaft.cli import main as every  # seconds of imports, most of them torch: only for those who need them

    every.main()


if __name__ == "__main__":
    main()
