"""A command for each stage, made from the stage's own config: its plain fields become options with their help texts.

A command takes the one artifact it mainly works from; the others it needs are looked up among that one's ancestors.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lineshaft.base.config import Config, load, parse_assignment
from lineshaft.base.errors import NotFound
from lineshaft.base.manifest import Kind
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Store
from lineshaft.compress.stage import COMPRESS
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.evaluate.stage import EVALUATE
from lineshaft.model.adopt import ADOPT, AdoptConfig
from lineshaft.pipeline.recipe import assign
from lineshaft.train.stage import PRETRAIN


@dataclass(frozen=True)
class Command:
    """A stage as a command: its name, what it says of itself, and the parent that is named on the command line."""

    name: str
    stage: Stage[Any]
    help: str
    main: str | None


COMMANDS = (
    Command("data", INGEST, "Read raw text: clean it, drop what is unfit, split off a held-out part. Makes a corpus.", None),
    Command("tokenizer", TRAIN_TOKENIZER, "Train a byte-level BPE tokenizer on a corpus.", "corpus"),
    Command("tokens", TOKENIZE, "Turn a corpus into token shards with a tokenizer.", "tokenizer"),
    Command("train", PRETRAIN, "Train a model on token shards. Makes a checkpoint.", "tokens"),
    Command("compress", COMPRESS, "Store a checkpoint's weights in fewer bits. Makes a checkpoint.", "checkpoint"),
    Command("evaluate", EVALUATE, "Measure a checkpoint: quality, size, speed, memory, cost. Makes a report.", "checkpoint"),
    Command("adopt", ADOPT, "Take a Hugging Face folder into the store. Makes a checkpoint.", None),
)


def add_stage_commands(app: typer.Typer) -> None:
    """Give the app a command for every stage."""
    for command in COMMANDS:
        app.command(name=command.name, help=command.help)(_function(command))


def _function(command: Command) -> Callable[..., None]:
    """A function whose signature Typer turns into arguments and options."""

    def carry_out(**given: Any) -> None:
        store = Store(given.pop("store"))
        assignments, as_json = given.pop("assignments") or [], given.pop("as_json")
        parents = _parents(store, command, {role: given.pop(role) for role in command.stage.parents})
        config = _config(command.stage.config, {name: value for name, value in given.items() if value is not None}, assignments)
        made = command.stage(store, config, **parents)
        print(json.dumps({"id": made.id, "path": str(made.root), "facts": made.manifest.facts}, ensure_ascii=False) if as_json else made.id)

    carry_out.__signature__ = inspect.Signature([*_arguments(command), *_options(command.stage.config), *_common()])  # type: ignore[attr-defined]
    return carry_out


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _arguments(command: Command) -> list[inspect.Parameter]:
    found = []
    for role, kind in command.stage.parents.items():
        if role == command.main:
            found.append(_parameter(role, Annotated[str, typer.Argument(help=f"The {kind}: reference or artifact id.")]))
        else:
            option = typer.Option(f"--{role}", help=f"The {kind}; by default the one that the {command.main} descends from.")
            found.append(_parameter(role, Annotated[str | None, option], None))
    return found


def _options(config: type[Config]) -> list[inspect.Parameter]:
    """One option for each field that holds a single plain value; `--set` reaches the nested ones."""
    found = []
    for name, field in config.model_fields.items():
        if _is_plain(field.annotation):
            shown = "required" if field.is_required() else f"default: {field.default}"
            text = f"{field.description or name} ({shown})"
            option = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)
            default = inspect.Parameter.empty if field.is_required() else None
            found.append(_parameter(name, Annotated[str | None, option] if default is None else Annotated[str, option], default))
    return found


def _is_plain(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(_is_plain(part) for part in typing.get_args(annotation))
    if origin is Annotated:
        return _is_plain(typing.get_args(annotation)[0])
    return origin is typing.Literal or annotation in (int, float, str, bool, type(None))


def _common() -> list[inspect.Parameter]:
    store = typer.Option("--store", envvar="LINESHAFT_STORE", help="Folder that holds the artifacts.")
    assignment = typer.Option("--set", metavar="A.B=VALUE", help="Set one value, nested ones too; may be repeated.")
    return [
        _parameter("assignments", Annotated[list[str] | None, assignment], None),
        _parameter("store", Annotated[Path, store], Path(".lineshaft")),
        _parameter("as_json", Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")], False),
    ]


def _config(kind: type[Config], given: dict[str, str], assignments: list[str]) -> Config:
    table: dict[str, Any] = {}
    for name, text in given.items():
        plain_text = kind.model_fields[name].annotation is str
        table[name] = text if plain_text else yaml.safe_load(text)
    defaults = {name: field.get_default() for name, field in kind.model_fields.items() if not field.is_required()}
    dumped = {name: value.model_dump() if isinstance(value, Config) else value for name, value in defaults.items()}
    for text in assignments:
        table = assign(table, dumped, *parse_assignment(text))
    return load(kind, table)


def _parents(store: Store, command: Command, named: dict[str, str | None]) -> dict[str, Artifact]:
    if command.main is None:
        return {}
    main = _artifact(store, str(named[command.main]), command.stage.parents[command.main])
    found = {command.main: main}
    for role, kind in command.stage.parents.items():
        if role != command.main:
            name = named[role]
            found[role] = _artifact(store, name, kind) if name else _ancestor(store, main, kind)
    return found


def _artifact(store: Store, name: str, kind: Kind) -> Artifact:
    """An artifact by reference or id; a checkpoint may also be a Hugging Face folder, which is taken into the store."""
    if kind == "checkpoint" and (Path(name) / "config.json").is_file():
        return ADOPT(store, AdoptConfig(folder=name))
    found = store.find(store.resolve(name))
    assert found is not None  # resolve has just seen it
    return found


def _ancestor(store: Store, artifact: Artifact, kind: Kind) -> Artifact:
    """The nearest ancestor of a kind."""
    line = [artifact]
    while line:
        parents = [store.find(parent) for item in line for parent in item.manifest.parents.values()]
        line = [parent for parent in parents if parent is not None]
        for parent in line:
            if parent.manifest.kind == kind:
                return parent
    raise NotFound(f"{artifact.id} descends from no {kind} in this store: name one with --{kind}")
