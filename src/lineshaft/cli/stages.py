"""A command for each stage, made from the stage's own config: its plain fields become options with their help texts.

A command takes the one artifact it mainly works from; the others it needs are looked up among that one's ancestors.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from lineshaft.base.config import Config, Table, load, parse_assignment
from lineshaft.base.errors import ConfigError, NotFound
from lineshaft.base.manifest import Kind
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Store
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, SetOption, StoreOption
from lineshaft.compress.stage import COMPRESS
from lineshaft.compress.steps import STEPS as COMPRESSING
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.evaluate.stage import EVALUATE
from lineshaft.model.adopt import ADOPT, ADOPT_TOKENIZER, AdoptConfig, AdoptTokenizerConfig
from lineshaft.pipeline.recipe import assign
from lineshaft.pipeline.reopen import reopened
from lineshaft.train.finetune import FINETUNE
from lineshaft.train.stage import PRETRAIN


@dataclass(frozen=True)
class Command:
    """A stage as a command: its name, what it says of itself, and the parent that is named on the command line."""

    name: str
    stage: Stage[Any]
    help: str
    main: str | None
    steps: Mapping[str, Stage[Any]] = field(default_factory=dict)
    """Other stages that the command carries out instead, chosen with --step; `stage` is among them."""

    def stages(self) -> list[Stage[Any]]:
        """All that it can carry out, the usual one first."""
        return [self.stage, *(stage for stage in self.steps.values() if stage is not self.stage)]


COMMANDS = (
    Command("data", INGEST, "Read raw text: clean it, drop what is unfit, split off a held-out part. Makes a corpus.", None),
    Command("tokenizer", TRAIN_TOKENIZER, "Train a byte-level BPE tokenizer on a corpus.", "corpus"),
    Command("tokens", TOKENIZE, "Turn a corpus into token shards with a tokenizer.", "tokenizer"),
    Command("train", PRETRAIN, "Train a model on token shards. Makes a checkpoint.", "tokens"),
    Command("finetune", FINETUNE, "Train a dense checkpoint further, on tokens made with its tokenizer. Makes a checkpoint.", "checkpoint"),
    Command("compress", COMPRESS, "Make a checkpoint smaller or faster. Makes a checkpoint.", "checkpoint", COMPRESSING),
    Command("evaluate", EVALUATE, "Measure a checkpoint: quality, size, speed, memory, cost. Makes a report.", "checkpoint"),
    Command("adopt", ADOPT, "Take a Hugging Face folder into the store. Makes a checkpoint.", None),
)

_GIVEN_AS: Mapping[Kind, str] = dict.fromkeys(("checkpoint", "tokenizer"), "reference, artifact id, or a Hugging Face folder")
"""What may stand for an artifact of these kinds; for the others a reference or an artifact id."""


def add_stage_commands(app: typer.Typer) -> None:
    """Give the app a command for every stage."""
    for command in COMMANDS:
        app.command(name=command.name, help=command.help)(_function(command))


def _function(command: Command) -> Callable[..., None]:
    """A function whose signature Typer turns into arguments and options."""

    def carry_out(**given: Any) -> None:
        store = Store(given.pop("store"))
        assignments, as_json = given.pop("assignments") or [], given.pop("as_json")
        stage = _chosen(command, given.pop("step", None))
        named = {role: given.pop(role) for role in _roles(command)}
        config = _config(stage.config, {name: value for name, value in given.items() if value is not None}, assignments)
        made = stage(store, config, **_parents(store, command, stage, named))
        print(json.dumps({"id": made.id, "path": str(made.root), "facts": made.manifest.facts}, ensure_ascii=False) if as_json else made.id)

    carry_out.__signature__ = inspect.Signature([*_arguments(command), *_options(command), *_common()])  # type: ignore[attr-defined]  # functions have it, mypy does not know; Typer reads it
    return carry_out


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _chosen(command: Command, step: str | None) -> Stage[Any]:
    if step is None:
        return command.stage
    if step not in command.steps:
        raise ConfigError(f'--step "{step}": one of {", ".join(command.steps)}')
    return command.steps[step]


def _roles(command: Command) -> dict[str, Kind]:
    """What any of the command's stages works from."""
    return {role: kind for stage in command.stages() for role, kind in stage.parents.items()}


def _arguments(command: Command) -> list[inspect.Parameter]:
    found = []
    for role, kind in _roles(command).items():
        text = f"The {kind}: {_GIVEN_AS.get(kind, 'reference or artifact id')}"
        if role == command.main:
            found.append(_parameter(role, Annotated[str, typer.Argument(help=f"{text}.")]))
        else:
            option = typer.Option(f"--{role}", metavar="ARTIFACT", help=f"{text}; by default the one behind the {command.main}.")
            found.append(_parameter(role, Annotated[str | None, option], None))
    return found


def _options(command: Command) -> list[inspect.Parameter]:
    """An argument for each field that must be given, an option for each other one that holds a single plain value."""
    found = []
    if command.steps:
        told = f"What to do; each has further settings (--set), docs/compression.md tells which. Default: {next(iter(command.steps))}."
        option = typer.Option("--step", help=told, metavar="|".join(command.steps))
        found.append(_parameter("step", Annotated[str | None, option], None))
    for name, about in command.stage.config.model_fields.items():
        if not _is_plain(about.annotation) or (name == "step" and command.steps):
            continue  # `--set` reaches the nested ones
        text, metavar = about.description or name, _metavar(about.annotation)
        if about.is_required():
            found.append(_parameter(name, Annotated[str, typer.Argument(help=text)]))
            continue
        shown = f"{text} Default: {'null' if about.default is None else about.default}."
        option = typer.Option(f"--{name.replace('_', '-')}", help=shown, metavar=metavar)
        found.append(_parameter(name, Annotated[str | None, option], None))
    return found


def _metavar(annotation: Any) -> str:
    """What kind of value an option takes, for its help. The values themselves are read as in a recipe."""
    parts = [part for part in _parts(annotation) if part is not type(None)]
    if all(typing.get_origin(part) is typing.Literal for part in parts):
        return "|".join(str(choice) for part in parts for choice in typing.get_args(part))
    return {int: "INTEGER", float: "NUMBER", bool: "true|false"}.get(parts[0], "TEXT")


def _parts(annotation: Any) -> list[Any]:
    """The types that an annotation may stand for."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for inner in typing.get_args(annotation) for part in _parts(inner)]
    return _parts(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else [annotation]


def _is_plain(annotation: Any) -> bool:
    return all(typing.get_origin(part) is typing.Literal or part in (int, float, str, bool, type(None)) for part in _parts(annotation))


def _common() -> list[inspect.Parameter]:
    return [
        _parameter("assignments", SetOption, None),
        _parameter("store", StoreOption, DEFAULT_STORE),
        _parameter("as_json", JsonOption, False),
    ]


def _config(kind: type[Config], given: dict[str, str], assignments: list[str]) -> Config:
    table: Table = {}
    for name, text in given.items():
        takes_text = str in _parts(kind.model_fields[name].annotation)
        table[name] = text if takes_text else parse_assignment(f"{name}={text}")[1]
    defaults = {name: field.get_default() for name, field in kind.model_fields.items() if not field.is_required()}
    dumped = {name: value.model_dump() if isinstance(value, Config) else value for name, value in defaults.items()}
    for text in assignments:
        table = assign(table, dumped, *parse_assignment(text))
    return load(kind, table)


def _parents(store: Store, command: Command, stage: Stage[Any], named: dict[str, str | None]) -> dict[str, Artifact]:
    if command.main is None:
        return {}
    if unused := [role for role, name in named.items() if name is not None and role not in stage.parents]:
        raise ConfigError(f"--{unused[0]}: {stage.name} works without it: leave it out")
    main = _artifact(store, str(named[command.main]), stage.parents[command.main])
    found = {command.main: main}
    for role, kind in stage.parents.items():
        if role != command.main:
            name = named[role]
            found[role] = _artifact(store, name, kind) if name else _ancestor(store, main, kind)
    return found


def _artifact(store: Store, name: str, kind: Kind) -> Artifact:
    """An artifact by reference or id. A Hugging Face folder may stand for a checkpoint or a tokenizer: it is taken into the store."""
    if kind == "checkpoint" and (Path(name) / "config.json").is_file():
        return ADOPT(store, AdoptConfig(folder=name))
    if kind == "tokenizer" and (Path(name) / "tokenizer.json").is_file():
        return ADOPT_TOKENIZER(store, AdoptTokenizerConfig(folder=name))
    return _found(store, store.resolve(name))


def _found(store: Store, artifact_id: str) -> Artifact:
    found = reopened(store, artifact_id)
    if found is None:
        raise NotFound(f"{artifact_id}: is referred to but no longer in {store.root}; make it again")
    return found


def _ancestor(store: Store, artifact: Artifact, kind: Kind) -> Artifact:
    """The nearest ancestor of a kind."""
    line = [artifact]
    while line:
        line = [_found(store, parent) for item in line for parent in item.manifest.parents.values()]
        for parent in line:
            if parent.manifest.kind == kind:
                return parent
    raise NotFound(f"{artifact.id} descends from no {kind} in this store: name one with --{kind}")
