"""`lineshaft export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lineshaft.base.terminal import say
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from lineshaft.cli.serving import checkpoint_folder
from lineshaft.compress.export import exporting
from lineshaft.compress.export.exporting import Target, TokenizerChoice


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: reference, artifact id, or a Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; replaced, if there, once the new one is proved.")],
    to: Annotated[Target, typer.Option("--to", help="gguf: for llama.cpp; onnx: for ONNX Runtime, prompts of small dense models.")],
    dynamic_int8: Annotated[
        bool, typer.Option("--dynamic-int8", help="onnx: have ONNX Runtime round a dense checkpoint's matrices to INT8.")
    ] = False,
    tokenizer: Annotated[TokenizerChoice, typer.Option(help="gguf: keep writes the tokenizer, none leaves a file for token ids.")] = "keep",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as one file for another engine. INT8 and INT4 keep their codes and scales: nothing is rounded twice."""
    folder, _ = checkpoint_folder(checkpoint, store)
    done = exporting.export(folder, target, to, tokenizer=tokenizer, dynamic_int8=dynamic_int8)
    if as_json:
        print(json.dumps(asdict(done) | {"path": str(done.path)}))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.kinds.items())
    seen = ", ".join(f"{name} {value:.2g}" for name, value in done.seen.items())
    say(f"{done.path}: {done.bytes} bytes, {done.tensors} tensors ({kinds}), read back and held against the checkpoint: {seen}")
