"""Taking a Hugging Face folder from elsewhere into the store, so that stages can work from it.

Whole it is a checkpoint; its tokenizer alone is what text is cut with before such a checkpoint is evaluated on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lineshaft.base.config import Config
from lineshaft.base.errors import BadCheckpoint
from lineshaft.base.files import record
from lineshaft.base.manifest import FILE_NAME
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.cost import cost_of
from lineshaft.model.folder import TOKENIZER_FILES, check_artifact
from lineshaft.text import contract
from lineshaft.text.tokenizer import Tokenizer

_SUFFIXES = {".json", ".safetensors", ".jinja"}


class AdoptTokenizerConfig(Config):
    """Where the tokenizer lies."""

    folder: str
    """A Hugging Face folder: config.json, safetensors, tokenizer.json."""


class AdoptConfig(AdoptTokenizerConfig):
    """Where the checkpoint lies, and what becomes of it."""

    dequantise: bool = False
    """Decode quantised weights (FP8, INT8) into dense ones, so that the model can be trained or compressed anew."""


def _files(config: AdoptConfig) -> list[Path]:
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder}: no config.json here; a checkpoint is a Hugging Face folder with config.json and safetensors")
    # An artifact's own manifest stays there: it speaks of that folder, not of the copy.
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.name != FILE_NAME and path.is_file())


def _inputs(config: AdoptConfig) -> dict[str, str]:
    return {path.name: record(path.parent, path.name).sha256 for path in _files(config)}


def _build(draft: Draft, config: AdoptConfig) -> None:
    source = Path(config.folder)
    check_artifact(source)
    if config.dequantise:
        save_checkpoint(load_checkpoint(source, dequantise=True), draft.root, source)
    else:
        for path in _files(config):
            shutil.copyfile(path, draft.root / path.name)
    model = load_checkpoint(draft.root)
    draft.facts |= contract.facts_of(draft.root, Path(config.folder))  # reads the tokenizer, so a folder without one is refused here
    cost = cost_of(model.config)
    formats = sorted({linear.format.describe() for linear in model.linears().values()})
    draft.facts |= {"parameters": cost.parameters, "active_parameters": cost.active_parameters, "format": ", ".join(formats)}


ADOPT = Stage(
    name="adopt",
    kind="checkpoint",
    version=2,
    config=AdoptConfig,
    build=_build,
    inputs=_inputs,
    unkeyed=frozenset({"folder"}),
)


def _tokenizer_files(config: AdoptTokenizerConfig) -> list[Path]:
    folder = Path(config.folder)
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _tokenizer_inputs(config: AdoptTokenizerConfig) -> dict[str, str]:
    return {path.name: record(path.parent, path.name).sha256 for path in _tokenizer_files(config)}


def _build_tokenizer(draft: Draft, config: AdoptTokenizerConfig) -> None:
    for path in _tokenizer_files(config):
        shutil.copyfile(path, draft.root / path.name)
    draft.facts |= contract.facts_of(draft.root, Path(config.folder)) | {"vocab_size": Tokenizer.load(draft.root).vocab_size}


ADOPT_TOKENIZER = Stage(
    name="adopt_tokenizer",
    kind="tokenizer",
    version=2,
    config=AdoptTokenizerConfig,
    build=_build_tokenizer,
    inputs=_tokenizer_inputs,
    unkeyed=frozenset({"folder"}),
)
