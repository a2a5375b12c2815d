"""`lineshaft serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lineshaft.base.config import Table, load, merge, nest, parse_assignment
from lineshaft.base.errors import NotFound
from lineshaft.base.store import Store
from lineshaft.engine.loop import EngineConfig
from lineshaft.serve.server import ServeConfig, run_server


def serve(
    path: Annotated[str, typer.Argument(help="A checkpoint: reference, artifact id, or a Hugging Face folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; anything but loopback opens the service to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    store: Annotated[Path, typer.Option("--store", envvar="LINESHAFT_STORE", help="Folder that holds the artifacts.")] = Path(".lineshaft"),
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="server.max_waiting=10, engine.cache_bytes=1000000000, ...")
    ] = None,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API."""
    table: Table = {"server": {"host": host, "port": port}, "engine": {"dtype": dtype}}
    for text in assignments or []:
        table = merge(table, nest(*parse_assignment(text)))
    server, engine = load(ServeConfig, table.pop("server"), "server"), load(EngineConfig, table.pop("engine"), "engine")
    folder = checkpoint_folder(path, store)
    run_server(folder, path if folder != Path(path) else folder.resolve().name, server, engine)


def checkpoint_folder(path: str, store: Path) -> Path:
    """The folder behind a reference, an artifact id, or a path. Raises NotFound."""
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if not store.is_dir():
        raise NotFound(f'"{path}": no folder with a config.json, and there is no store at {store} to look it up in (name one with --store)')
    kept = Store(store)
    return kept.root / "artifacts" / kept.resolve(path)
