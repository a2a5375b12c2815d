"""The safetensors files of a checkpoint: one, or several with an index, as transformers writes and reads them.

Read tensors are mapped, not loaded: a page of the file comes into memory when it is used, and can leave it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint
from lineshaft.base.files import is_inside, sync_folder
from lineshaft.model.folder import read_json, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in the files, mapped from disk.

    Raises BadCheckpoint naming the file that is missing or can't be read, or the tensor that is not where the index says.
    """
    whole = (folder / WEIGHTS).exists() or not (folder / INDEX).exists()
    places = None if whole else _index(folder)
    tensors: dict[str, Tensor] = {}
    for file in [WEIGHTS] if places is None else sorted(set(places.values())):
        found = _mapped(folder / file)
        if places is not None:
            _check_places(folder, file, found, places)
        tensors |= found
    return tensors


def _index(folder: Path) -> dict[str, str]:
    """Tensor to file, from the index."""
    listed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise BadCheckpoint(f"{folder / INDEX}: weight_map must name the file of each tensor")
    for name in sorted(set(listed.values())):
        if "/" in name or not is_inside(name):
            raise BadCheckpoint(f"{folder / INDEX}: names a file outside the folder: {name}")
        if not (folder / name).is_file():
            raise BadCheckpoint(f"{folder}: {name} is missing: {INDEX} names it")
    return listed


def _check_places(folder: Path, file: str, found: Mapping[str, Tensor], places: Mapping[str, str]) -> None:
    """A file must hold exactly what the index says: each tensor then stands once in a checkpoint."""
    for name in sorted(found):
        if (place := places.get(name)) != file:
            told = f"puts it into {place}" if place else "does not name it"
            raise BadCheckpoint(f"{folder / file}: holds {name}, but {INDEX} {told}")
    for name, place in sorted(places.items()):
        if place == file and name not in found:
            raise BadCheckpoint(f"{folder / file}: {name} is not in it, but {INDEX} says so")


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: can't be read as safetensors: {error}") from None


def weights_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint, without file headers."""
    return sum(tensor.nbytes for tensor in read_tensors(folder).values())


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write tensors, in their order, into one file, or into several of at most `shard_bytes` (tensors are never split) and an index.

    Nothing is copied but what is not contiguous or stands twice under two names, and that for one file at a time.
    """
    shards = _packed(tensors, shard_bytes)
    if len(shards) == 1:
        _write(folder / WEIGHTS, tensors, shards[0])
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SHARD.format(number=number, count=len(shards))
        _write(folder / file, tensors, names)
        places |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _packed(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names a file: as many as fit, in order; one that is larger alone stands alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(path: Path, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    seen: set[int] = set()
    written: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors[name].detach().contiguous()
        written[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # safetensors refuses memory under two names
        seen.add(tensor.data_ptr())
    save_file(written, path, {"format": "pt"})
    sync_folder(path)


def remove_weights(folder: Path) -> None:
    """Remove config.json and all weights, config.json first: what is left is no checkpoint, whatever happens next.

    Models mapped from these files keep working: their memory stays as long as they do.
    """
    for name in ("config.json", INDEX, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        path.unlink()
