"""Where the bytes of weights come from."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lineshaft.engine.starts.weights import LINE, Bytes, Files, Region
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.names import to_file
from lineshaft.model.linear import Linear
from lineshaft.model.rope import speeds
from lineshaft.model.scorer import Scorer
from lineshaft.ops.formats import Dense
from lineshaft.ops.packed import Packed
from lineshaft.ops.packing import Shape

ROOM = 4
"""The disk must have so many times the bytes that are written."""


class Sources:
    """Of each weight. `small`: from the checkpoint where it can be, which is tried: what it leads to must be the
    bytes in memory. Else all are written."""

    def __init__(self, model: Decoder, folder: Path, draft: Path, weights: BinaryIO, small: bool) -> None:
        self.crc = 0
        """zlib.crc32 of what was written."""
        self._files, self._weights = Files(folder, draft), weights
        stored = (entry for path in sorted(folder.glob("*.safetensors")) for entry in _stored_in(path))
        self._stored = dict(stored) if small else {}
        self._names: dict[int, tuple[str, Shape | None]] = {}
        for tensor, name, shape in weights_of(model):
            self._names.setdefault(tensor.data_ptr(), (to_file(model.config.family, name), shape))

    def traced(self, memory: Sequence[Bytes], regions: Sequence[Region]) -> list[Region]:
        """The regions, those of weights with their sources. OSError where the disk is too full."""
        found = [self._source(own, region) for own, region in zip(memory, regions, strict=True)]
        wanted = sum(region.size for region in found if region.kind == "own")
        if shutil.disk_usage(self._weights.name).free < ROOM * wanted:
            raise OSError(f"{self._weights.name}: the disk has less than {ROOM} times the {wanted} bytes of these weights left")
        return [self._written(own) if region.kind == "own" else region for own, region in zip(memory, found, strict=True)]

    def _source(self, memory: Bytes, region: Region) -> Region:
        """The region as it is where its weight must be written, or it holds none."""
        if region.kind != "own":
            return region
        name, shape = self._names[memory.ctypes.data]
        for wanted in (name, "model.embed_tokens.weight"):  # the second is behind a head that shares it
            found = self._in_checkpoint(wanted, shape, len(memory))
            if found and np.array_equal(self._files.weight(found), memory):
                return found
        return region

    def _in_checkpoint(self, name: str, shape: Shape | None, size: int) -> Region | None:
        if name not in self._stored:
            return None
        path, start, stored = self._stored[name]
        if shape is None:
            return Region(size, "file", path.name, start) if stored == size else None
        kind, inputs, outputs, *_ = shape.native
        alike = stored == inputs * outputs * (4 if shape.kind == "float32" else 2)
        return Region(size, "dense", path.name, start, shape=(kind, inputs, outputs)) if alike else None

    def _written(self, memory: Bytes) -> Region:
        offset, padding = self._weights.tell(), bytes(-len(memory) % LINE)
        for part in (memory.data, padding):
            self._weights.write(part)
            self.crc = zlib.crc32(part, self.crc)
        return Region(len(memory), "own", offset=offset)


def weights_of(model: Decoder) -> Iterator[tuple[Tensor, str, Shape | None]]:
    """What calls may read of a model: each tensor, the name of what it was made from, and the shape by which that was packed (None: it
    is as it was). Whether that is so is for others to try. Of a tensor that comes twice the first counts."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and isinstance(module.format, Packed) and isinstance(module.format.origin, Dense):
            yield module.tensors()["packed"], f"{name}.weight", module.format.shape
        elif isinstance(module, Scorer) and module.packed is not None:
            yield module.packed[1], f"{name}.weight", module.packed[0]
        for own, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            yield tensor.detach(), f"{name}.{own}", None
    yield speeds(model.config, torch.device("cpu")), "", None


def _stored_in(path: Path) -> Iterator[tuple[str, tuple[Path, int, int]]]:
    """Tensors of a safetensors file: file, first byte, bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, (path, 8 + length + first, last - first)
