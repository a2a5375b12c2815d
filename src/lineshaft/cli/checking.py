"""`lineshaft check`: will it fit, what will it cost, which kernels will run, before any weight is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lineshaft.base.config import Table, load, merge, nest, parse_assignment, read_yaml
from lineshaft.base.errors import ConfigError
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from lineshaft.cli.serving import checkpoint_folder
from lineshaft.compress.forecasts import FORECASTS, made_of, step_config
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.pool import context_of
from lineshaft.engine.preflight import Serving, judge_serving
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.cost import attention_flops, cost_of, kv_bytes
from lineshaft.model.fit import Verdict, told_bytes
from lineshaft.model.folder import load_config
from lineshaft.model.memory import Stored, is_format, stored_in
from lineshaft.model.operators import ops_used
from lineshaft.ops.isa import library
from lineshaft.ops.table import chosen, steady
from lineshaft.pipeline.recipe import read_recipe
from lineshaft.train.preflight import Training, judge_training
from lineshaft.train.stage import TrainConfig

Task = Literal["serve", "train", "compress"]
DOES_NOT_FIT = 8
"""Exit status when the task does not fit: that of the error with which the task itself would be refused."""
_FORMATS = ("dense", "int8", "int8-32", "int4-32", "fp8")


def check(
    model: Annotated[str, typer.Argument(help="Checkpoint (reference, id or folder; a config.json is enough), or a recipe or model YAML.")],
    task: Annotated[Task, typer.Option(help="What is to be done with it.")] = "serve",
    fmt: Annotated[str | None, typer.Option("--format", help=f"Weights as they would be stored: {', '.join(_FORMATS)}.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dense weights as they would be stored: float32 or bfloat16.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context: max_context when serving.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Serving: requests at once.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training: rows in a batch.")] = None,
    sequence_tokens: Annotated[int | None, typer.Option(min=1, help="Training: tokens in a row.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, such as 16GiB; default: what this machine has free.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="A value of engine, train or compress, as these take it; compress.step: the step."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Tell from the description alone what a model costs, and whether a task with it fits here. Status 8 when it does not."""
    config, stored, section = _described(model, store)
    stored = _stored(stored, fmt, dtype)
    given = {"max_context": context, "scheduler": {"max_batch": batch} if batch else None}
    flags: Table = {"engine": given, "train": {"rows": rows, "sequence_tokens": sequence_tokens}, "compress": {}}
    table: Table = {name: {key: value for key, value in values.items() if value is not None} for name, values in flags.items()}
    table = merge({"train": section}, table)
    for text in assignments or []:
        table = merge(table, nest(*parse_assignment(text)))
    if unknown := sorted(table.keys() - flags.keys()):
        raise ConfigError(f'--set "{unknown[0]}": unknown; begin with engine., train. or compress.')
    room = None if memory is None else _bytes(memory)
    judged = _judged(task, config, stored, table, room)
    shown = _shown(config, stored, task, judged)
    print(json.dumps(shown, ensure_ascii=False) if as_json else _told(shown))
    if not judged.verdict.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _described(model: str, store: Path) -> tuple[ModelConfig, Stored, Table]:
    """The model, how its weights are stored, and the train section of the recipe that describes it."""
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    folder = path.parent if path.name == "config.json" and path.is_file() else checkpoint_folder(model, store)[0]
    return load_config(folder), stored_in(folder), {}


def _from_yaml(path: Path) -> tuple[ModelConfig, Stored, Table]:
    """A model's description by itself, or a recipe: its train section with the tokenizer's vocabulary."""
    if path.is_file() and "family" in (table := read_yaml(path.read_text(encoding="utf-8"), str(path))):
        return load(ModelConfig, table, str(path)), Stored(), {}
    recipe = read_recipe(path).recipe
    described = recipe.train.model.model_dump() | {"vocab_size": recipe.tokenizer.vocab_size}
    return load(ModelConfig, described), Stored(), recipe.train.model_dump(exclude={"model"})


def _stored(stored: Stored, fmt: str | None, dtype: str | None) -> Stored:
    if fmt is not None and not is_format(fmt):
        more = "-N for groups of N; after it -zeros (int4: with zero points) and -a8 (activations rounded to 8 bits)"
        raise ConfigError(f'--format "{fmt}": unknown; one of {", ".join(_FORMATS)}; integers with {more}')
    if dtype is not None and dtype not in ("float32", "bfloat16"):
        raise ConfigError(f'--dtype "{dtype}": unknown; float32 or bfloat16')
    stored = stored if dtype is None else stored.cast(dtype)
    return stored if fmt in (None, stored.format) else replace(stored, format=str(fmt), in_files=None)


_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6, "": 1}


def _bytes(text: str) -> int:
    """`16GiB`, `500 MB` or `1073741824` as bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GiB|MiB|GB|MB|)", text.strip())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size:
        raise ConfigError(f'--memory "{text}": write it as 16GiB, 16GB, 500MiB, 500MB or a number of bytes')
    return size


@dataclass(frozen=True)
class _Judged:
    """What was found of a task."""

    verdict: Verdict
    context: int
    """Tokens at which the task works."""
    format: str
    """Of the weights that products meet; what is compressed will be served, so those that come of it."""
    coded: bool = False
    """The cache is held in 8 bits."""


def _judged(task: Task, config: ModelConfig, stored: Stored, table: Table, room: int | None) -> _Judged:
    if task == "serve":
        engine = load(EngineConfig, table["engine"], "engine")
        verdict = judge_serving(Serving(config, stored, engine), room)
        return _Judged(verdict, context_of(config, engine), stored.format, engine.cache_dtype == "int8")
    if task == "train":
        train = load(TrainConfig, table["train"], "train")
        given = Training(config, train.rows, train.sequence_tokens, train.loop.accumulate, train.loop.precision)
        return _Judged(judge_training(given, room), train.sequence_tokens, stored.format)
    step = step_config(table["compress"])
    verdict = FORECASTS[step.step](config, stored, step, room)
    return _Judged(verdict, getattr(step, "sequence_tokens", config.max_position_embeddings), made_of(step, stored))


def _shown(config: ModelConfig, stored: Stored, task: Task, judged: _Judged) -> dict[str, Any]:
    """Everything that is told, as the JSON object that --json prints."""
    cost, verdict, context = cost_of(config), judged.verdict, judged.context
    formats = {
        "float32": Stored(),
        "bfloat16": Stored("bfloat16"),
        "int8, one scale a channel": Stored("bfloat16", "int8"),
        "int8, groups of 32": Stored("bfloat16", "int8-32"),
    }
    used = ops_used(config, judged.format, "train" if task == "train" else "serve", library() is not None, judged.coded)
    with steady(task != "train"):  # as the engine runs them
        origins = chosen("cpu")
    kernels = {op: origins[op] for op in used}
    return {
        "family": config.family,
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "bytes": {name: kind.total(config) for name, kind in formats.items()},
        "stored": {"as": stored.describe(), "bytes": stored.total(config)},
        "kv_bytes_per_token": {name: config.num_hidden_layers * kv_bytes(config, name) for name in _held(config)},
        "flops_per_token": cost.flops_per_token,
        "context": context,
        "flops_per_token_at_context": cost.flops_per_token + attention_flops(config, context) - attention_flops(config, context - 1),
        "task": task,
        "memory": {"process": verdict.own, **verdict.memory.phases[verdict.memory.peak]},
        "peak_phase": verdict.memory.peak,
        "peak_bytes": verdict.needs,
        "room_bytes": verdict.room,
        "fits": verdict.fits,
        "change": verdict.change,
        "advice": "" if verdict.fits else verdict.advice,
        "device": "cpu",
        "kernels": kernels,
        "faster_share": sum(origin != "reference" for origin in kernels.values()) / len(kernels),
    }


def _held(config: ModelConfig) -> list[str]:
    """What a cache can be held as: an indexer can't read codes."""
    indexer = isinstance(config.attention, LatentAttention) and config.attention.indexer is not None
    return ["float32", "bfloat16", *([] if indexer else ["int8"])]


def _told(shown: dict[str, Any]) -> str:
    """The same for people: a line a figure."""
    kernels, faster = shown["kernels"], [op for op, origin in shown["kernels"].items() if origin != "reference"]
    listed = f": {', '.join(faster)}" if faster else ""
    work, far = (_count(shown[name]) for name in ("flops_per_token", "flops_per_token_at_context"))
    lines = [
        ("model", f"{shown['family']}, {_count(shown['parameters'])} parameters, {_count(shown['active_parameters'])} active"),
        *((f"  {name}", told_bytes(size)) for name, size in shown["bytes"].items()),
        ("stored", f"{shown['stored']['as']}: {told_bytes(shown['stored']['bytes'])}"),
        ("cache a token", ", ".join(f"{told_bytes(size)} {name}" for name, size in shown["kv_bytes_per_token"].items())),
        ("a token", f"{work}FLOP, {far}FLOP at {shown['context']} tokens of context"),
        (shown["task"], f"peak {told_bytes(shown['peak_bytes'])} ({shown['peak_phase']}), {told_bytes(shown['room_bytes'])} can be had"),
        *((f"  {name}", told_bytes(size)) for name, size in shown["memory"].items() if size),
        ("verdict", "fits" if shown["fits"] else "does not fit"),
        *([] if shown["fits"] else [("  change", shown["advice"])]),
        ("kernels", f"{len(faster)} of {len(kernels)} ops have one of their own on {shown['device']}{listed}"),
        *([("  reference", ", ".join(op for op in kernels if op not in faster))] if len(faster) < len(kernels) else []),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
