"""A start that was kept: an engine from the native calls that an earlier start recorded, without importing torch.

    program.msgpack    the calls, with places for addresses; where each place's bytes come from; what the engine must know
    weights.bin        bytes that are not in the checkpoint as the kernels read them

Dense weights are packed anew from the checkpoint (ADR 0014: as fast as reading them packed). The first tokens' logits must have the
bits that they had when the start was kept, or it is given up. Written by keeping.py.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lineshaft.base.caches import is_ours
from lineshaft.base.machine import available_memory_bytes, resident_memory_bytes
from lineshaft.base.pages import huge, place
from lineshaft.base.terminal import say
from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.page_memory import PageMemory
from lineshaft.engine.program import Choices, Floats, Program
from lineshaft.engine.rounds import Bounds, Rounds
from lineshaft.engine.start_key import start_key, starts_of
from lineshaft.engine.warm import fingerprint
from lineshaft.model.folder import check_artifact, load_config
from lineshaft.ops.isa import STEP_CALLS, library
from lineshaft.sched.groups import layer_groups
from lineshaft.sched.plan import Plan

PROGRAM, WEIGHTS = "program.msgpack", "weights.bin"
CACHE_SHARE = 0.5
"""As in preflight.py: of what is left beside weights and activations the cache takes at most so much, unless a size was asked for."""

Bytes = npt.NDArray[np.uint8]


class Region(msgspec.Struct, frozen=True):
    """Memory that calls name places in. `size`: bytes."""

    size: int
    kind: Literal["work", "buffer", "pages", "file", "dense", "own"]
    """work: what a step leaves; buffer: of StepBuffers, pages: of PageMemory, both the next one in their order; file: bytes of a
    checkpoint's file; dense: packed from such bytes; own: bytes of weights.bin."""
    file: str = ""
    offset: int = 0
    """In that file, or in weights.bin."""
    crc: int = 0
    """zlib.crc32 of own bytes."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """Of what is packed: kind of numbers (packed.h), inputs, outputs."""


class Place(msgspec.Struct, frozen=True):
    """An address: so many bytes into a region."""

    region: int
    offset: int


class Result(msgspec.Struct, frozen=True):
    """An array that the program leaves: rows of so many numbers."""

    place: Place
    rows: int
    width: int
    dtype: Literal["float32", "uint16"]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.width * np.dtype(self.dtype).itemsize


class Kept(msgspec.Struct, frozen=True):
    """What program.msgpack holds."""

    calls: list[tuple[str, list[Any]]]
    """A function of the library and its arguments; where one is a table it is a Place."""
    body: int
    """Calls before those that make logits."""
    regions: list[Region]
    hidden: Result
    logits: Result
    threads: int
    config: dict[str, Any]
    """Settings of the engine, with what was settled when it was loaded."""
    bounds: dict[str, Any]
    pages: list[int]
    token_bytes: list[int]
    fingerprint: str
    facts: dict[str, Any]
    """What whoever asked for the engine was told of it."""


@dataclass(frozen=True)
class Reopened:
    """An engine that is ready, and what was told of it when it was kept."""

    engine: Rounds
    facts: dict[str, Any]


class KeptRunner:
    """Runs plans by a kept program. Implements Runs."""

    def __init__(self, program: Program, cache: PageMemory, memory: Sequence[Bytes]) -> None:
        """`memory`: what the program's addresses lie in; it must live as long."""
        self.most_rows = program.buffers.most_rows
        self.logits, self.hidden = program.logits, program.hidden
        self._program, self._cache, self._memory = program, cache, memory

    def run(self, plan: Plan) -> Floats:
        """See Runs."""
        for group, source, target in plan.copies:
            self._cache.copy(group, source, target)
        self._program.buffers.fill(plan)
        return self._program.run()

    @staticmethod
    def draw(logits_RV: Floats, choices_R5: Choices) -> list[int]:
        """See Runs."""
        native: Any = library()
        rows, width = logits_RV.shape
        tokens = np.empty(rows, np.int64)
        native.sample(logits_RV.ctypes.data, logits_RV.strides[0] // 4, width, choices_R5.ctypes.data, tokens.ctypes.data, rows)
        return tokens.tolist()


def reopened(folder: Path, config: EngineConfig) -> Reopened | None:
    """The engine of a start that was kept for this checkpoint and these settings; None where there is none that can be used.

    Raises Corrupt for an artifact whose bytes are not those of its manifest: it is looked through as it is for any start.
    """
    if not (config.keep_start and config.batch_invariant and starts_of(folder).is_dir() and library()):
        return None
    try:
        root = starts_of(folder) / start_key(folder, config)
        if not (root / PROGRAM).is_file() or not is_ours(root):
            return None
        kept = msgspec.msgpack.decode((root / PROGRAM).read_bytes(), type=Kept)
        if not _fits(kept, config):
            return None
        with ThreadPoolExecutor(1) as beside:
            checked = beside.submit(check_artifact, folder)
            engine = _engine(folder, root, kept)
            same = fingerprint(engine) == kept.fingerprint
            _raised(checked)
    except (OSError, ValueError, KeyError, TypeError, IndexError, msgspec.MsgspecError) as error:
        say(f"the start that was kept can't be used ({type(error).__name__}: {error}): starting anew")
        return None
    if not same:
        say("the start that was kept gives other numbers than it did: starting anew")
        return None
    return Reopened(engine, kept.facts)


def _raised(checked: Future[None]) -> None:
    checked.result()


def _fits(kept: Kept, config: EngineConfig) -> bool:
    """Is there the memory that it takes, with a cache as large as a new start would allow?"""
    weights = sum(region.size for region in kept.regions if region.kind in ("file", "dense", "own"))
    work = sum(region.size for region in kept.regions if region.kind == "work")
    cache = sum(region.size for region in kept.regions if region.kind == "pages")
    left = available_memory_bytes() - resident_memory_bytes() - weights - work
    return cache <= (left if config.cache_bytes is not None else CACHE_SHARE * left)


def _engine(folder: Path, root: Path, kept: Kept) -> Rounds:
    native: Any = library()
    native.set_threads(kept.threads)
    config, model = EngineConfig.model_validate(kept.config), load_config(folder)
    groups = layer_groups([model.reach_of(layer) for layer in range(model.num_hidden_layers)])
    cache = PageMemory(groups, kept.pages, config.page_tokens, kept.token_bytes)
    bounds, limits = Bounds(**{**kept.bounds, "ends": frozenset(kept.bounds["ends"])}), config.scheduler
    buffers = StepBuffers(len(groups), config.page_tokens, limits.step_tokens, limits.max_batch, bounds.context_tokens)
    memory = _memory(folder, root, kept.regions, cache, buffers)
    step = _recorded(native, kept, memory)
    program = Program(step, buffers, _array(kept.hidden, memory), _array(kept.logits, memory))
    return Rounds(bounds, config, cache, KeptRunner(program, cache, memory))


def _memory(folder: Path, root: Path, regions: Sequence[Region], cache: PageMemory, buffers: StepBuffers) -> list[Bytes]:
    """The bytes of every region, weights with what they hold."""
    pages = iter(memory for layer in cache.memory for memory in layer)
    numbers, files, found = iter(buffers.named().values()), Files(folder, root), list[Bytes]()
    for region in regions:
        if region.kind == "pages":
            own = np.frombuffer(next(pages), np.uint8)
        elif region.kind == "buffer":
            own = next(numbers).reshape(-1).view(np.uint8)
        elif region.kind == "work":
            own = np.frombuffer(huge(region.size), np.uint8)
        else:
            own = files.weight(region)
        if len(own) < region.size:
            raise ValueError(f"a region of {region.size} bytes has {len(own)}")
        found.append(own)
    return found


class Files:
    """The bytes that weights are made of."""

    def __init__(self, folder: Path, root: Path) -> None:
        """`folder`: of the checkpoint. `root`: of the kept start."""
        self._folder, self._root = folder, root
        self._mapped: dict[Path, Bytes] = {}

    def weight(self, region: Region) -> Bytes:
        """A weight as the kernels read it, in memory of its own. ValueError where its bytes are not what they were."""
        taken = place(region.size)
        out = np.frombuffer(taken.memory, np.uint8, region.size, taken.offset)
        if region.kind == "dense":
            kind, inputs, outputs = region.shape
            native: Any = library()
            if native.packed_bytes(kind, inputs, outputs, 0, False) != region.size:
                raise ValueError(f"a weight of {outputs} x {inputs} does not pack to {region.size} bytes")
            source = self._source(self._folder / region.file, region.offset, inputs * outputs * (4 if kind == 0 else 2))
            native.pack_dense(kind, inputs, outputs, source.ctypes.data, inputs, out.ctypes.data)
        else:
            path = self._root / WEIGHTS if region.kind == "own" else self._folder / region.file
            out[:] = self._source(path, region.offset, region.size)
            if region.kind == "own" and zlib.crc32(out.data) != region.crc:
                raise ValueError(f"{path} is damaged")
        return out

    def _source(self, path: Path, offset: int, size: int) -> Bytes:
        if path not in self._mapped:
            with path.open("rb") as file:
                self._mapped[path] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        found = self._mapped[path][offset : offset + size]
        if len(found) != size:
            raise ValueError(f"{path} ends before byte {offset + size}")
        return found


def _recorded(native: Any, kept: Kept, memory: Sequence[Bytes]) -> Any:
    """The step, its calls noted by the library as they were when it was kept."""
    native.begin_step()
    try:
        for number, (name, args) in enumerate(kept.calls):
            if number == kept.body:
                native.finish_step()
            if name not in STEP_CALLS:
                raise ValueError(f"{name} is no call of a step")
            getattr(native, name)(*(_resolved(arg, memory) for arg in args))
    finally:
        step = native.end_step()
    return step


def _resolved(arg: Any, memory: Sequence[Bytes]) -> Any:
    if isinstance(arg, dict):
        return _address(msgspec.convert(arg, Place), memory)
    return [_resolved(item, memory) for item in arg] if isinstance(arg, list) else arg


def _address(where: Place, memory: Sequence[Bytes]) -> int:
    own = memory[where.region]
    if not 0 <= where.offset < len(own):
        raise ValueError(f"byte {where.offset} of a region of {len(own)}")
    return own.ctypes.data + where.offset


def _array(result: Result, memory: Sequence[Bytes]) -> npt.NDArray[Any]:
    own = memory[result.place.region][result.place.offset :][: result.size]
    return own.view(result.dtype).reshape(result.rows, result.width)
