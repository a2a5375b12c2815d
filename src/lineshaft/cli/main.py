"""`lineshaft`: every command, and the one place where our errors become messages and exit codes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lineshaft.base.config import flatten
from lineshaft.base.errors import LineshaftError
from lineshaft.base.store import Store
from lineshaft.cli import serving, showing
from lineshaft.cli.stages import add_stage_commands
from lineshaft.pipeline.recipe import Recipe, Sourced, read_recipe
from lineshaft.pipeline.run import run as run_recipe
from lineshaft.pipeline.run import write_report
from lineshaft.pipeline.summary import print_summary, summary_json

StoreOption = Annotated[Path, typer.Option("--store", envvar="LINESHAFT_STORE", help="Folder that holds the artifacts.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Set one value; may be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]

app = typer.Typer(help="A language model from raw documents to an answering service.", no_args_is_help=True, add_completion=False)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/quickstart.yaml.")],
    assignments: SetOption = None,
    store: StoreOption = Path(".lineshaft"),
    explain: Annotated[bool, typer.Option("--explain", help="Print every value and where it came from; run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: make what is missing, then show what came out."""
    sourced = read_recipe(recipe, assignments or [])
    if explain:
        _explain(sourced, as_json)
        return
    kept = Store(store)
    outcome = run_recipe(kept, sourced.recipe)
    page = write_report(kept, sourced.recipe, outcome)
    if as_json:
        print(json.dumps(summary_json(outcome) | {"page": str(page)}, ensure_ascii=False))
    else:
        print_summary(outcome, Console(), page=page)


def _explain(sourced: Sourced, as_json: bool) -> None:
    rows = [(path, value, sourced.origin[path]) for path, value in flatten(sourced.recipe.model_dump(mode="json"))]
    if as_json:
        print(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, ensure_ascii=False))
        return
    for path, value, origin in rows:
        print(f"{path} = {json.dumps(value, ensure_ascii=False)}    # {origin}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipe files."""
    print(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


app.command(name="serve")(serving.serve)
app.command(name="show")(showing.show)
app.command(name="verify")(showing.verify)
add_stage_commands(app)


def main() -> None:
    """Entry point. Our errors end with their message and code; anything else is a defect of ours and shows its traceback."""
    try:
        app(prog_name="lineshaft")
    except LineshaftError as error:
        print(f"lineshaft: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
