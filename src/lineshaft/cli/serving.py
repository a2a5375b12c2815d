"""`lineshaft serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lineshaft.base.config import Table, load, merge, nest, parse_assignment
from lineshaft.base.errors import ConfigError, NotFound
from lineshaft.cli.options import DEFAULT_STORE, StoreOption
from lineshaft.engine.config import EngineConfig
from lineshaft.pipeline.reopen import looked_up
from lineshaft.serve.server import ServeConfig, run_server

SECTIONS = ("server", "engine")


def serve(
    path: Annotated[str, typer.Argument(help="A checkpoint: reference, artifact id, or a Hugging Face folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; anything but loopback opens the service to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto (as stored), float32 or bfloat16.")] = "auto",
    store: StoreOption = DEFAULT_STORE,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Set one value of server or engine, such as engine.cache_bytes=1000000000."),
    ] = None,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API, until Ctrl-C."""
    table = with_assignments({"server": {"host": host, "port": port}, "engine": {"dtype": dtype}}, assignments, SECTIONS)
    server, engine = load(ServeConfig, table["server"], "server"), load(EngineConfig, table["engine"], "engine")
    folder, name = checkpoint_folder(path, store)
    run_server(folder, name, server, engine)


def with_assignments(table: Table, assignments: Sequence[str] | None, sections: Sequence[str]) -> Table:
    """The table with what `--set` says laid on it. Raises ConfigError for a section that the command does not have."""
    for text in assignments or []:
        table = merge(table, nest(*parse_assignment(text)))
    if unknown := sorted(table.keys() - set(sections)):
        raise ConfigError(f'--set "{unknown[0]}": unknown; begin with {" or ".join(f"{section}." for section in sections)}')
    return table


def checkpoint_folder(path: str, store: Path) -> tuple[Path, str]:
    """The folder behind a path, a reference or an artifact id, and the name to serve it under.

    Raises NotFound, Corrupt, or ConfigError for an artifact that is no checkpoint. Its weights are checked when they are loaded.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder, folder.resolve().name
    if folder.is_dir():
        raise NotFound(f"{folder}: no config.json here; a checkpoint is a Hugging Face folder with config.json and safetensors")
    found = looked_up(store, path, "folder with a config.json")
    if found.manifest.kind != "checkpoint":
        raise ConfigError(f"{found.id} is a {found.manifest.kind}: only a checkpoint can be served")
    return found.root, path
