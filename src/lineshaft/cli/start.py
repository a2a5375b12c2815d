"""The `lineshaft` command. `serve` takes a short way that loads neither torch nor the other commands, so that it listens at once."""

from __future__ import annotations

import gc
import sys

from lineshaft.serve.spawn import spawn_ahead


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["serve"]:
        if len(sys.argv) > 2 and "--help" not in sys.argv:  # a checkpoint is named
            spawn_ahead(sys.argv[2])  # it imports torch, or what a kept start needs, while this process imports the web server
        serve()
        return
    from lineshaft.cli import main as every  # seconds of imports, most of them torch: only for those who need them

    every.main()


def serve() -> None:
    """`lineshaft serve` alone."""
    gc.disable()  # collecting garbage takes an eighth of the time that these imports do, and finds nothing
    import typer

    from lineshaft.cli import serving
    from lineshaft.cli.ending import run_app

    gc.freeze()
    gc.enable()
    short = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    short.command(name="serve")(serving.serve)
    short.callback()(_about)
    run_app(short)


def _about() -> None:
    """A language model's whole life, from raw documents to an answering service."""


if __name__ == "__main__":
    main()
