"""What a run needs to go on after it was killed: weights, optimiser moments, step, history. No pickle.

    <folder>/step-00000100/    state.safetensors, state.json, files.json (their hashes), written aside and renamed into place

The newest complete state is used; a damaged one is named on the terminal and the one before it is used instead: training
is deterministic, so that costs time and changes nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lineshaft.base import files
from lineshaft.base.config import load
from lineshaft.base.errors import Corrupt, LineshaftError
from lineshaft.base.terminal import say
from lineshaft.model.decoder import Decoder

KEEP = 2
"""States kept: the newest, and one to fall back on."""

_FILES = ("state.safetensors", "state.json")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter; `step` lags where an expert got no token, and so no gradient, in some steps."""

History = list[dict[str, float]]


def save(folder: Path, step: int, model: Decoder, optimiser: torch.optim.AdamW, history: History) -> None:
    """Write the state after `step` steps; a crash at any moment leaves the earlier states usable."""
    write(folder, step, _tensors(model, optimiser), {"step": step, "history": history})


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Keep any state under this number: tensors, and what JSON holds. The newest before it is kept as well, older ones go."""
    draft, final = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    with files.full_disk_told(folder):
        draft.mkdir(parents=True)
        save_file(tensors, draft / "state.safetensors")
        (draft / "state.json").write_text(json.dumps(about))
        records = [files.record(draft, name).model_dump() for name in _FILES]
        files.sync_tree(draft)
        files.write_atomic(draft / "files.json", json.dumps(records).encode())
        draft.rename(final)
        files.sync_folder(folder)
    for old in _complete(folder)[:-KEEP]:
        shutil.rmtree(old)


def restore(folder: Path, model: Decoder, optimiser: torch.optim.AdamW) -> tuple[int, History]:
    """Load the newest undamaged state into model and optimiser; (steps done, history), or (0, []) when there is none."""
    if (found := newest(folder)) is None:
        return 0, []
    tensors, about = found
    _put_back(tensors, model, optimiser)
    return int(about["step"]), about["history"]


def newest(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and JSON of the newest undamaged state; None when there is none. A damaged one is named and removed."""
    for state in reversed(_complete(folder)):
        try:
            _verify(state)
        except (LineshaftError, ValueError, OSError) as error:
            say(f"resume: {state.name} is damaged, going back to the one before: {error}")
            shutil.rmtree(state)  # else it would stand where this run will save, and count as one of those kept
            continue
        return load_file(state / "state.safetensors"), json.loads((state / "state.json").read_text())
    return None


def _verify(state: Path) -> None:
    records = json.loads((state / "files.json").read_text())
    if not isinstance(records, list) or [item.get("name") for item in records] != list(_FILES):
        raise Corrupt(f"{state / 'files.json'}: does not list {' and '.join(_FILES)}")
    for item in records:
        files.verify(state, load(files.FileRecord, item))


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tensors(model: Decoder, optimiser: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if state := optimiser.state.get(parameter):  # none as long as no token has come to an expert
            moments |= {f"{key}.{name}": state[key] for key in _MOMENTS}
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | moments


def _put_back(tensors: dict[str, torch.Tensor], model: Decoder, optimiser: torch.optim.AdamW) -> None:
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:
            optimiser.state[parameter] = {key: tensors[f"{key}.{name}"] for key in _MOMENTS}
