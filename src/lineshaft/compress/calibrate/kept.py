"""What a walk leaves on disk after each part, to go on from when it is killed. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineshaft.base import files
from lineshaft.base.config import load
from lineshaft.base.errors import LineshaftError
from lineshaft.base.terminal import say

_SCALE = "scale of "
_FILE = "state.safetensors"


def save(
    folder: Path, number: int, part: Mapping[str, Tensor], scales: Mapping[str, Tensor], unseen: list[str], hidden: list[Tensor]
) -> None:
    """Write part `number` (from 1), then the hidden states after it; those of the part before are dropped once these are whole."""
    with files.full_disk_told(folder):
        _write(folder, f"part-{number:04d}", {**part, **{f"{_SCALE}{name}": s_C for name, s_C in scales.items()}}, unseen)
        _write(folder, f"hidden-{number:04d}", {f"{place:06d}": x_TI for place, x_TI in enumerate(hidden)}, [])
    shutil.rmtree(folder / f"hidden-{number - 1:04d}", ignore_errors=True)


def done(folder: Path, parts: int) -> int:
    """How many parts are done: the newest whose files, those before it, and hidden states are whole; 0 when none is.

    Training's rule holds here, too: what is damaged is named and done again, which costs time and changes nothing.
    """
    whole = 0
    while whole < parts and _is_whole(folder / f"part-{whole + 1:04d}"):
        whole += 1
    while whole and not _is_whole(folder / f"hidden-{whole:04d}"):
        whole -= 1
    return whole


def tensors(folder: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """A part's tensors, mapped from disk, the scales found, and layers that no token came to."""
    place = folder / f"part-{number:04d}"
    found = _mapped(place / _FILE)
    scales = {name.removeprefix(_SCALE): found.pop(name) for name in list(found) if name.startswith(_SCALE)}
    return found, scales, json.loads((place / "unseen.json").read_text())


def hidden(folder: Path, number: int) -> list[Tensor]:
    """The hidden states after part `number`."""
    found = _mapped(folder / f"hidden-{number:04d}" / _FILE)
    return [found[name] for name in sorted(found)]


def _write(folder: Path, name: str, content: Mapping[str, Tensor], unseen: list[str]) -> None:
    draft, final = folder / f".{name}.part", folder / name
    for old in (draft, final):  # one that was damaged may stand there
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({key: tensor.detach().contiguous() for key, tensor in content.items()}, draft / _FILE)
    (draft / "unseen.json").write_text(json.dumps(unseen))
    records = [files.record(draft, item).model_dump() for item in (_FILE, "unseen.json")]
    files.sync_tree(draft)
    files.write_atomic(draft / "files.json", json.dumps(records).encode())
    draft.rename(final)
    files.sync_folder(folder)


def _is_whole(place: Path) -> bool:
    if not place.exists():
        return False
    try:
        for item in json.loads((place / "files.json").read_text()):
            files.verify(place, load(files.FileRecord, item))
    except (LineshaftError, ValueError, OSError) as error:
        say(f"resume: {place.name} is damaged and is made again: {error}")
        return False
    return True


def _mapped(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
