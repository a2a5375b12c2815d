"""What lies in a checkpoint folder beside the weights.

    config.json                         what the model is, and its `quantization_config` when compressed
    model.safetensors                   the weights; or shards with model.safetensors.index.json
    generation_config.json              which tokens end an answer
    tokenizer.json, ...                 carried along untouched
    manifest.json                       when the folder is an artifact of a store

Free of torch: a model can be described, and judged, before anything is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lineshaft.base import manifest
from lineshaft.base.errors import BadCheckpoint
from lineshaft.base.files import sync_folder
from lineshaft.model.config import ModelConfig
from lineshaft.model.hf.config import from_hf

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises BadCheckpoint when it is missing or broken."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder}: no {name} here; a checkpoint is a Hugging Face folder with config.json and safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{folder / name}: can't be read: {error}") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{folder / name}: expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as checkpoints hold it, indented, keys sorted; on disk when this returns."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync_folder(path)


def load_config(folder: Path) -> ModelConfig:
    """The description of the model in a checkpoint folder; generation_config.json's end tokens win over config.json's."""
    hf = read_json(folder, "config.json")
    if (folder / "generation_config.json").exists():
        eos = read_json(folder, "generation_config.json").get("eos_token_id")
        hf |= {} if eos is None else {"eos_token_id": eos}
    return from_hf(hf)


def check_artifact(folder: Path) -> None:
    """When the folder is an artifact, read every byte against its manifest. Raises Corrupt naming file and block."""
    if not (folder / manifest.FILE_NAME).exists():
        return
    found = manifest.read(folder)
    if found.kind != "checkpoint":
        raise BadCheckpoint(f"{folder}: is an artifact of kind {found.kind}, not a checkpoint")
    manifest.check_files(folder, found)
