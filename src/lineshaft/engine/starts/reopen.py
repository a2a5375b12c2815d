"""An engine from a start that was kept, without torch.

The first tokens' logits must have the bits that they had when the start was kept, or it is given up.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lineshaft.base.caches import is_ours
from lineshaft.base.errors import Corrupt
from lineshaft.base.machine import available_memory_bytes, resident_memory_bytes
from lineshaft.base.pages import huge
from lineshaft.base.terminal import say
from lineshaft.engine.buffers import StepBuffers
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.page_memory import CACHE_SHARE, PageMemory
from lineshaft.engine.program import Choices, Floats, Program
from lineshaft.engine.rounds import Bounds, Rounds
from lineshaft.engine.starts.format import PROGRAM, Kept, Place, Result, read
from lineshaft.engine.starts.key import any_kept, start_basis, start_key, starts_of
from lineshaft.engine.starts.weights import Bytes, Files, Region
from lineshaft.engine.warm import fingerprint
from lineshaft.model.folder import check_artifact, load_config
from lineshaft.ops.isa import STEP_CALLS, library
from lineshaft.sched.groups import layer_groups
from lineshaft.sched.plan import Plan

MOST_ENDINGS = 2
"""Processes that may end while they open a start, with none in between that opens it: one may have been stopped, as after a wrong option
or Ctrl-C."""


@dataclass(frozen=True)
class Reopened:
    """An engine that is ready, what was told of it when it was kept, and where that was."""

    engine: Rounds
    facts: dict[str, Any]
    root: Path
    files: Files
    crc: int

    def settle(self) -> None:
        """Move weights that are read where the file lies into memory, and look through them. Raises Corrupt when they are not what was
        written: the engine must not work on, nor may what was kept stay."""
        if self.files.move_in() not in (None, self.crc):
            raise Corrupt(f"{self.root}: kept weights are not those that were written: the next start is a new one")


class KeptRunner:
    """Runs plans by a kept program. Implements Runs."""

    def __init__(self, program: Program, cache: PageMemory, *memory: object) -> None:
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


def kept_for(folder: Path, config: EngineConfig) -> Path | None:
    """The folder of a start that was kept for this checkpoint and these settings."""
    if config.keep_start == "nothing" or not config.batch_invariant or not any_kept(folder) or not library():
        return None
    with suppress(OSError):  # of the checkpoint: loading tells it better
        root = starts_of(folder) / start_key(start_basis(folder), config)
        return root if root.is_dir() else None
    return None


def only_one(folder: Path) -> Path | None:
    """The start that was kept for a checkpoint folder, whatever the settings were; None where there is none, or several."""
    found = any_kept(folder)
    return found[0] if len(found) == 1 and library() else None


def reopened(folder: Path, root: Path) -> Reopened | None:
    """The engine of the start that was kept in `root` for the checkpoint in `folder`. None, and a line that says why, where it can't be
    used; one that is damaged, gives other numbers than it did, or ended processes that opened it, is removed.

    Raises Corrupt for an artifact whose bytes are not those of its manifest: it is looked through as it is for any start.
    """
    try:
        with _opening(root):
            return _reopened(folder, root)
    except (ValueError, KeyError, TypeError, IndexError, StopIteration, FileNotFoundError, msgspec.MsgspecError) as error:
        say(f"the start that was kept can't be used, and is removed ({str(error) or type(error).__name__}): starting anew")
        shutil.rmtree(root, ignore_errors=True)
    except (OSError, MemoryError, RuntimeError) as error:
        say(f"the start that was kept can't be used now ({error}): starting anew")
    return None


def _reopened(folder: Path, root: Path) -> Reopened | None:
    kept = read(root / PROGRAM)
    if kept.key != root.name:
        raise ValueError("it was kept under another name")
    if kept.basis != start_basis(folder):
        say("what the start that was kept hangs on was changed: starting anew")
        return None
    if not _fits(kept):
        say("there is less memory than the start that was kept would take: starting anew")
        return None
    with ThreadPoolExecutor(1) as beside:
        checked, files = beside.submit(check_artifact, folder), Files(folder, root)
        engine = _engine(folder, files, kept)
        if fingerprint(engine) != kept.fingerprint:
            raise ValueError("it gives other numbers than it did")
        checked.result()
    with suppress(OSError):
        os.utime(root.parent)  # which counts as used (keep.py)
    return Reopened(engine, kept.facts, root, files, kept.crc)


@contextmanager
def _opening(root: Path) -> Iterator[None]:
    """Leaves a mark while it is open. ValueError where others may write there, or too many processes ended over it."""
    if not is_ours(root):
        raise ValueError("others may write into its folder")
    left = [mark for mark in root.glob("opening-*") if _ended(int(mark.name.split("-")[1]))]
    if len(left) >= MOST_ENDINGS:
        raise ValueError(f"{len(left)} processes that opened it ended over it")
    mark = root / f"opening-{os.getpid()}-{time.time_ns()}"
    with suppress(OSError):  # a cache that can only be read
        mark.touch()
    try:
        yield
    finally:
        for own in (mark, *left):
            with suppress(OSError):
                own.unlink(missing_ok=True)


def _ended(number: int) -> bool:
    """Has the process? One of our own number has: of a container, say, whose processes are numbered anew."""
    return number == os.getpid() or not Path(f"/proc/{number}").exists()


def _fits(kept: Kept) -> bool:
    """Is there the memory that it takes, with a cache as large as a new start would allow?"""
    weights = sum(region.size for region in kept.regions if region.kind in ("file", "dense", "own"))
    work = sum(region.size for region in kept.regions if region.kind == "work")
    cache = sum(region.size for region in kept.regions if region.kind == "pages")
    left = available_memory_bytes() - resident_memory_bytes() - weights - work
    return cache <= (left if kept.cache_asked else CACHE_SHARE * left)


def _engine(folder: Path, files: Files, kept: Kept) -> Rounds:
    native: Any = library()
    native.set_threads(kept.threads)
    config, model = EngineConfig.model_validate(kept.config), load_config(folder)
    groups = layer_groups([model.reach_of(layer) for layer in range(model.num_hidden_layers)])
    cache = PageMemory(groups, kept.pages, config.page_tokens, kept.token_bytes)
    bounds, limits = Bounds(**{**kept.bounds, "ends": frozenset(kept.bounds["ends"])}), config.scheduler
    buffers = StepBuffers(len(groups), config.page_tokens, limits.step_tokens, limits.max_batch, bounds.context_tokens)
    memory = _memory(files, kept.regions, cache, buffers)
    step = _recorded(native, kept, memory)
    program = Program(step, buffers, _array(kept.hidden, memory), _array(kept.logits, memory))
    return Rounds(bounds, config, cache, KeptRunner(program, cache, memory, files))


def _memory(files: Files, regions: Sequence[Region], cache: PageMemory, buffers: StepBuffers) -> list[Bytes]:
    """The bytes of every region, weights with what they hold."""
    pages = iter(memory for layer in cache.memory for memory in layer)
    numbers, found = iter(buffers.named().values()), list[Bytes]()
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


def _recorded(native: Any, kept: Kept, memory: Sequence[Bytes]) -> Any:
    """The step, its calls noted by the library as they were when it was kept."""
    native.begin_step()
    try:
        for number, (name, args) in enumerate(kept.calls):
            if number == kept.body:
                native.finish_step()
            if name not in STEP_CALLS:
                raise ValueError(f"{name} is no call of a step")
            places = STEP_CALLS[name]
            getattr(native, name)(*(_address(arg, memory) if place in places else arg for place, arg in enumerate(args)))
    finally:
        step = native.end_step()
    return step


def _address(arg: Any, memory: Sequence[Bytes]) -> Any:
    """Of a Place, or of each of a list; 0 stands for none."""
    if isinstance(arg, list):
        return [_address(item, memory) for item in arg]
    if arg == 0:
        return arg
    where = msgspec.convert(arg, Place)
    own = memory[where.region]
    if not 0 <= where.offset < len(own):
        raise ValueError(f"byte {where.offset} of a region of {len(own)}")
    return own.ctypes.data + where.offset


def _array(result: Result, memory: Sequence[Bytes]) -> npt.NDArray[Any]:
    own = memory[result.place.region][result.place.offset :][: result.size]
    return own.view(result.dtype).reshape(result.rows, result.width)
