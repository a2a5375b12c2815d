"""Options that several commands have, so that each is spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path(".lineshaft")

StoreOption = Annotated[Path, typer.Option("--store", envvar="LINESHAFT_STORE", help="Folder that holds the artifacts.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Set one value, nested ones too; may be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class ToldStop(SystemExit):
    """A command that was interrupted, has said so, and ends with what it got until then."""
