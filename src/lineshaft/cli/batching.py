"""`lineshaft batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lineshaft.base.config import load
from lineshaft.base.terminal import say
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from lineshaft.cli.serving import checkpoint_folder, with_assignments
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.batch import BatchConfig, run_batch, summary

SECTIONS = ("batch", "engine")


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in OpenAI's batch format, one JSON object on each line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where the answers go, in the same order.")],
    model: Annotated[str, typer.Option("--model", help="A checkpoint: reference, artifact id, or a Hugging Face folder.")],
    name: Annotated[str | None, typer.Option("--name", help="What the requests call the model; by default as `serve` would.")] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto (as stored), float32 or bfloat16.")] = "auto",
    store: StoreOption = DEFAULT_STORE,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Set one value of batch or engine, such as batch.in_flight=16."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests without a server. The same command goes on where an earlier run ended, however it ended."""
    table = with_assignments({"engine": {"dtype": dtype}, "batch": {}}, assignments, SECTIONS)
    config, engine = load(BatchConfig, table["batch"], "batch"), load(EngineConfig, table["engine"], "engine")
    folder, usual = checkpoint_folder(model, store)
    tally = run_batch(folder, name or usual, source, target, config, engine)
    if as_json:
        print(json.dumps(summary(tally)))
        return
    earlier = f", {tally.earlier} by earlier runs" if tally.earlier else ""
    say(f"{target}: {tally.requests} answers{earlier}; {tally.refused} of this run are refusals (response.status_code is not 200)")
