"""`export`: a checkpoint folder to one file for another engine, written under another name until it is proved."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lineshaft.base.errors import ConfigError
from lineshaft.base.files import full_disk_told, sync_folder
from lineshaft.base.terminal import say
from lineshaft.compress.export import gguf, gguf_metadata, gguf_proof, gguf_tokenizer, onnx, onnx_graph
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer
from lineshaft.text import contract

Target = Literal["gguf", "onnx"]
TokenizerChoice = Literal["keep", "none"]


@dataclass(frozen=True)
class Exported:
    """What was written, and what was seen when it was read back."""

    path: Path
    bytes: int
    tensors: int
    kinds: dict[str, int]
    """How many tensors are of which kind."""
    seen: dict[str, float]
    """What was measured: `offset_error_steps` (gguf_proof.Proof), or `largest_logit_error` and `golden_nats` (onnx.Seen)."""


def export(checkpoint: Path, target: Path, to: Target, *, tokenizer: TokenizerChoice = "keep", dynamic_int8: bool = False) -> Exported:
    """Write the checkpoint in a folder as a file for llama.cpp (gguf) or ONNX Runtime (onnx).

    `tokenizer`: none leaves it out of a GGUF file, which then runs on token ids alone. `dynamic_int8`: have ONNX Runtime round a dense
    checkpoint's matrices to INT8.
    Until its weights were read back and compared the file has another name; on any error there is nothing at `target`, or what was.
    Raises UnsupportedModel and ConfigError naming what the format can't say, BadCheckpoint where the written file is not the model,
    MissingExtra.
    """
    if to == "onnx" and tokenizer == "none":
        raise ConfigError("export: an ONNX file never holds a tokenizer: leave --tokenizer out")
    if to == "gguf" and dynamic_int8:
        raise ConfigError("export: dynamic_int8 is ONNX Runtime's: for GGUF, compress to INT8 first and export what comes out")
    if target.is_dir() or not target.parent.is_dir():
        told = "is a folder" if target.is_dir() else "is in a folder that there is not"
        raise ConfigError(f"export: {target} {told}: name the file to write")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with full_disk_told(target):
            written = _to_gguf(checkpoint, part, target, tokenizer) if to == "gguf" else _to_onnx(checkpoint, part, target, dynamic_int8)
            sync_folder(part)
            os.replace(part, target)
            sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
    return written


def _to_gguf(checkpoint: Path, part: Path, target: Path, tokenizer: TokenizerChoice) -> Exported:
    gguf.package()  # a missing package is told before anything is read
    model = load_checkpoint(checkpoint)
    config = model.config
    said = gguf_metadata.metadata(config)
    if tokenizer == "keep":
        contract.check_folder(checkpoint)
        said |= gguf_tokenizer.vocabulary(checkpoint, config)
    else:
        said |= gguf_tokenizer.no_vocabulary()
    weights = gguf.weights_of(model)
    listed = gguf.entries(config, weights)
    _say_of_activations(model, "llama.cpp rounds them in its own way")
    gguf.write(part, config, weights, listed, said)
    proof = gguf_proof.prove(part, config, weights, listed, said)
    kinds = Counter(str(entry.kind) for entry in listed)
    return Exported(
        target, part.stat().st_size, proof.tensors, dict(sorted(kinds.items())), {"offset_error_steps": proof.offset_error_steps}
    )


def _to_onnx(checkpoint: Path, part: Path, target: Path, dynamic_int8: bool) -> Exported:
    for name in ("onnx", "onnxruntime"):
        onnx_graph.package(name)
    # In float32, as the graph computes. What it is proved against must not round what meets a weight either.
    model = load_checkpoint(checkpoint, dtype=torch.float32)
    _say_of_activations(model, "the file does not round them")
    for linear in model.linears().values():
        if isinstance(linear.format, Integer):
            linear.format = replace(linear.format, activations=None)
    if any(isinstance(linear.format, Integer) for linear in model.linears().values()):
        say(f"export: ONNX Runtime rounds what meets codes to 8 bits, unless the session's {onnx.ACCURACY_LEVEL} is 1, as in the proof")
    onnx.write(part, model, dynamic_int8)
    seen = onnx.prove(part, model, dynamic_int8)
    measured = {"largest_logit_error": seen.largest_logit_error, "golden_nats": seen.golden_nats}
    return Exported(target, part.stat().st_size, seen.tensors, seen.kinds, measured)


def _say_of_activations(model: Decoder, instead: str) -> None:
    if any(isinstance(linear.format, Integer) and linear.format.activations for linear in model.linears().values()):
        say(f"export: that activations are rounded to int8 is not carried over: {instead}")
