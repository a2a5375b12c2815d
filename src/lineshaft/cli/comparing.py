"""`lineshaft compare`: what one model lost against another, from their reports, and a gate for CI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lineshaft.base import manifest
from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact
from lineshaft.base.terminal import say
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from lineshaft.evaluate.compared import compared
from lineshaft.evaluate.lost import Compared, Line
from lineshaft.pipeline.lost import print_lost
from lineshaft.pipeline.reopen import looked_up

FAILED = 1
"""Exit status when something rose by more than it may."""
GATED = {"loss": "loss_rise_share", "perplexity": "perplexity_rise_share"}
"""What --fail-above takes, and the line of the comparison that it is about."""

ReportArgument = "A report: reference, artifact id, or the artifact's folder."
FailAboveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-above",
        metavar="loss=1%|perplexity=1%",
        help="Status 1 if the whole 95 % interval of that rise lies above this; may be repeated.",
    ),
]


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help=f"{ReportArgument} The model that is compared with.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help=f"{ReportArgument} The model in question.")],
    fail_above: FailAboveOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Tell what the second model lost against the first, from their reports on the same tokens.

    Status 1 only with --fail-above: a rise no larger than allowed fails in at most 2.5 % of cases; a larger one may pass where there is too
    little text to be sure.
    """
    limits = dict(_limit(text) for text in fail_above or [])
    before, after = _report(store, old), _report(store, new)
    found = compared(before, after)
    if found is None:
        told = "evaluate both again, on a text of several documents"
        raise ConfigError(f"{before.id} and {after.id} do not hold two documents each to be compared by: {told}")
    exceeded = _exceeded(found, limits)
    if as_json:
        gate = {"limits": limits, "exceeded": [line.name for line in exceeded]}
        print(json.dumps({"old": before.id, "new": after.id} | found.table() | {"gate": gate}, ensure_ascii=False))
    else:
        print_lost(before.id, [(after.id, found)], Console())
    for line in exceeded:
        say(f"lineshaft: {line.words.partition(',')[0]} rose by {line.interval.low:.2%} at least, more than {limits[line.name]:.2%}")
    if exceeded:
        raise typer.Exit(FAILED)


def _exceeded(found: Compared, limits: Mapping[str, float]) -> Sequence[Line]:
    """The lines whose true rise is above its limit as far as can be told."""
    return [line for line in found.lines() if line.name in limits and line.interval.verdict(limits[line.name]) == "worse"]


def _limit(text: str) -> tuple[str, float]:
    """The name of a line and the rise that it may have, as a share. Raises ConfigError."""
    name, _, value = text.partition("=")
    if name not in GATED:
        raise ConfigError(f'--fail-above "{text}": name one of {", ".join(GATED)}, such as loss=1%')
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f'--fail-above "{text}": the rise that is allowed is a share from 0 on, such as 0.01 or 1%')
    return GATED[name], number


def _report(store: Path, name: str) -> Artifact:
    """A report by reference, by id, or by its folder, which may lie outside a store. Raises NotFound, Corrupt, ConfigError."""
    folder = Path(name).absolute()
    found = _opened(folder) if (folder / manifest.FILE_NAME).is_file() else looked_up(store, name, "folder of a report")
    if found.manifest.kind != "report":
        raise ConfigError(f"{found.id} is a {found.manifest.kind}: name the report that `evaluate` made of it")
    return found


def _opened(root: Path) -> Artifact:
    found = manifest.read(root)
    manifest.check_files(root, found)
    return Artifact(root, found)
