"""Keeps a start, so that the next one needs no torch (kept.py reads it)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lineshaft.base.caches import is_ours
from lineshaft.base.files import sync_folder
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.kept import PROGRAM, Kept, Place, Result, write
from lineshaft.engine.kept_weights import LINE, WEIGHTS, Bytes, Files, Region
from lineshaft.engine.loop import Engine
from lineshaft.engine.start_key import start_basis, start_key, starts_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.names import to_file
from lineshaft.model.linear import Linear
from lineshaft.model.moe import OutputGate, Router
from lineshaft.model.rope import speeds
from lineshaft.ops.formats import Dense
from lineshaft.ops.isa import STEP_CALLS, library
from lineshaft.ops.packed import Packed
from lineshaft.ops.packing import Shape
from lineshaft.ops.recording import Recorded

MOST_STARTS = 8
"""Checkpoints whose starts are kept; the one that was used longest ago goes first."""
ROOM = 4
"""The disk must have so many times the bytes that are written."""
_STALE_S = 3600
"""After so long what is half written is left over from a process that has gone."""


@dataclass(frozen=True)
class Asked:
    """What a start hangs on. To be made before anything is read: what changes while it is loaded is noticed."""

    folder: Path
    config: EngineConfig
    """The settings by which it will be found."""
    basis: str

    @classmethod
    def now(cls, folder: Path, config: EngineConfig) -> Asked | None:
        """None where no start is to be kept, or it can't be said what it hangs on."""
        if config.keep_start == "nothing" or library() is None or sys.platform != "linux":
            return None
        with suppress(OSError):
            return cls(folder, config, start_basis(folder))
        return None

    @property
    def key(self) -> str:
        """See start_key.py."""
        return start_key(self.basis, self.config)


def keep(engine: Engine, asked: Asked | None, fingerprint: str, facts: dict[str, Any]) -> threading.Thread | None:
    """Keep the start of this engine in a thread of low priority. None where there is nothing to keep: steps are not recorded.

    `facts`: what `Reopened` is to give back.
    """
    native = engine.runner.native
    if asked is None or native is None or native.recorded is None:
        return None
    writer = _Writer(engine, native.recorded, asked, fingerprint, facts)
    thread = threading.Thread(target=writer.write, name="keeping the start", daemon=True)
    thread.start()
    return thread


class _Writer:
    def __init__(self, engine: Engine, recorded: Recorded, asked: Asked, fingerprint: str, facts: dict[str, Any]) -> None:
        self._engine, self._recorded, self._asked = engine, recorded, asked
        self._fingerprint, self._facts = fingerprint, facts

    def write(self) -> None:
        """What goes wrong is said; serving goes on."""
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            home = starts_of(self._asked.folder)
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (home / self._asked.key).exists():  # one that can't be used now is left
                self._write_beside(home)
        except (OSError, ValueError, RuntimeError) as error:
            say(f"this start is not kept, so the next one takes as long: {error}")

    def _write_beside(self, home: Path) -> None:
        """Into a folder that takes its place when all of it is on the disk."""
        key = self._asked.key
        draft = home / f".{key}-{os.getpid()}"
        draft.mkdir(mode=0o700)
        try:
            if not is_ours(draft):
                raise OSError(f"{draft}: others may write there, whatever mode it is given")
            self._write_into(draft)
            if start_basis(self._asked.folder) != self._asked.basis:
                raise ValueError("the checkpoint, or our own code, was changed meanwhile")
            draft.rename(home / key)
            sync_folder(home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            _tidy(home, key)

    def _write_into(self, draft: Path) -> None:
        places = _Places(self._engine, self._recorded)
        calls = [(name, places.of_call(name, args)) for name, args in self._recorded.calls]
        hidden, logits = (_result(tensor, places) for tensor in (self._recorded.output, self._recorded.finished))
        with (draft / WEIGHTS).open("xb") as weights:
            small = self._asked.config.keep_start == "program"
            sources = _Sources(self._engine.model, self._asked.folder, draft, weights, small)
            regions = sources.traced(places.memory, places.regions)
            os.fsync(weights.fileno())
        native: Any = library()
        bounds = asdict(self._engine.bounds)
        kept = Kept(
            basis=self._asked.basis,
            key=self._asked.key,
            calls=calls,
            body=self._recorded.body,
            regions=regions,
            hidden=hidden,
            logits=logits,
            threads=native.threads(),
            config=self._engine.config.model_dump(mode="json"),
            crc=sources.crc,
            cache_asked=self._asked.config.cache_bytes is not None,
            bounds={**bounds, "ends": sorted(bounds["ends"])},
            pages=self._engine.cache.pages,
            token_bytes=self._engine.cache.token_bytes,
            fingerprint=self._fingerprint,
            facts=self._facts,
        )
        write(draft / PROGRAM, kept)


class _Places:
    """Where the addresses of the calls are. Only what they name becomes a region, but for the cache's and the buffers', which all do."""

    def __init__(self, engine: Engine, recorded: Recorded) -> None:
        native = engine.runner.native
        assert native is not None
        self.memory: list[Bytes] = []
        self.regions: list[Region] = []
        known: list[tuple[Bytes, str]] = [(_bytes_of(block), "work") for block in recorded.arena.blocks]
        known += [(_bytes_of(tensor), "own") for tensor, *_ in weights_of(engine.model)]
        for memory in chain.from_iterable(engine.cache.memory):
            self._take(np.frombuffer(memory, np.uint8), "pages")
        for numbers in native.buffers.named().values():
            self._take(numbers.reshape(-1).view(np.uint8), "buffer")
        known += zip(self.memory, (region.kind for region in self.regions), strict=True)
        self._known = sorted((own.ctypes.data, place) for place, (own, _) in enumerate(known))
        self._all = known
        self._numbers = {own.ctypes.data: number for number, own in enumerate(self.memory)}

    def of_call(self, name: str, args: Sequence[Any]) -> list[Any]:
        """The arguments, with Places for addresses."""
        return [self.of(arg) if place in STEP_CALLS[name] else arg for place, arg in enumerate(args)]

    def of(self, address: Any) -> Any:
        """The Place of an address, or of each of a list. ValueError for one that lies in no memory we know."""
        if isinstance(address, list | tuple):
            return [self.of(item) for item in address]
        if address == 0:
            return address
        at = bisect_right(self._known, (address, len(self._all))) - 1
        own, kind = self._all[self._known[at][1]]
        start = own.ctypes.data
        if at < 0 or not start <= address < start + len(own):
            raise ValueError("a recorded call names memory that is none of the model's")
        if start not in self._numbers:
            self._numbers[start] = self._take(own, kind)
        return Place(self._numbers[start], address - start)

    def _take(self, memory: Bytes, kind: Any) -> int:
        self.memory.append(memory)
        self.regions.append(Region(len(memory), kind))
        return len(self.memory) - 1


class _Sources:
    """Where the bytes of weights come from. `small`: from the checkpoint where they can, which is tried: what it leads to must be the
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
        elif isinstance(module, Router | OutputGate) and module.packed is not None:
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


def _bytes_of(tensor: Tensor) -> Bytes:
    """Without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _result(tensor: Tensor, places: _Places) -> Result:
    rows, width = tensor.shape
    where = places.of(tensor.data_ptr())
    return Result(where, rows, width, "float32" if tensor.dtype == torch.float32 else "uint16")


def _tidy(home: Path, key: str) -> None:
    """Other starts of the checkpoint go, and checkpoints that were not started for the longest time."""
    for path in home.iterdir():
        if path.name != key and (not path.name.startswith(".") or path.stat().st_mtime < time.time() - _STALE_S):
            shutil.rmtree(path, ignore_errors=True)
    os.utime(home)
    oldest: Sequence[Path] = sorted(home.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_STARTS]
    for path in oldest:
        shutil.rmtree(path, ignore_errors=True)
