"""`lineshaft`: every command."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lineshaft.base.config import flatten
from lineshaft.base.store import Store
from lineshaft.base.terminal import say
from lineshaft.cli import batching, benching, checking, comparing, exporting, serving, showing
from lineshaft.cli.ending import run_app
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, SetOption, StoreOption
from lineshaft.cli.stages import add_stage_commands
from lineshaft.ops.isa import describe, library
from lineshaft.ops.table import chosen, steady
from lineshaft.pipeline.recipe import Recipe, Sourced, read_recipe
from lineshaft.pipeline.run import run as run_recipe
from lineshaft.pipeline.run import write_report
from lineshaft.pipeline.summary import print_summary, summary_json

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lineshaft {importlib.metadata.version('lineshaft')}")
        raise typer.Exit


@app.callback()
def lineshaft(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A language model's whole life, from raw documents to an answering service.

    Begin with: lineshaft run recipes/quickstart.yaml
    """


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/quickstart.yaml.")],
    assignments: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
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
        return
    print_summary(outcome, Console(), page=page)
    where = "" if store == DEFAULT_STORE else f" --store {store}"
    say(f"serve it with: lineshaft serve {sourced.recipe.name}{where}")


def _explain(sourced: Sourced, as_json: bool) -> None:
    rows = [(path, value, sourced.origin[path]) for path, value in flatten(sourced.recipe.model_dump(mode="json"))]
    if as_json:
        print(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, ensure_ascii=False))
        return
    for path, value, origin in rows:
        print(f"{path} = {json.dumps(value, ensure_ascii=False)}    # {origin}")


@app.command()
def kernels(as_json: JsonOption = False) -> None:
    """Tell which kernels serve here: the instruction set in use, and where each op's kernel comes from."""
    with steady():
        origins = chosen("cpu")
    found = library()
    if as_json:
        table = {"chosen": found.chosen(), "runnable": found.names(), "threads": found.threads()} if found else None
        print(json.dumps({"native": table, "ops": origins}))
        return
    print(describe())
    for origin in sorted(set(origins.values())):
        print(f"{origin}: {', '.join(op for op, where in origins.items() if where == origin)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipe files, for editors and checks."""
    print(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


app.command(name="batch")(batching.batch)
app.command(name="check")(checking.check)
app.command(name="bench")(benching.bench_command)
app.command(name="compare")(comparing.compare)
app.command(name="export")(exporting.export)
app.command(name="serve")(serving.serve)
app.command(name="show")(showing.show)
app.command(name="verify")(showing.verify)
add_stage_commands(app)


def main() -> None:
    """Entry point of `python -m lineshaft.cli.main`, with every command."""
    run_app(app)


if __name__ == "__main__":
    main()
