"""Where the addresses of recorded calls are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineshaft.engine.loop import Engine
from lineshaft.engine.starts.format import Place, Result
from lineshaft.engine.starts.sources import weights_of
from lineshaft.engine.starts.weights import Bytes, Region
from lineshaft.ops.isa import STEP_CALLS
from lineshaft.ops.recording import Recorded


class Places:
    """The memory that calls name. Only what they name becomes a region, but for the cache's and the buffers', which all do."""

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


def _bytes_of(tensor: Tensor) -> Bytes:
    """Without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def result_of(tensor: Tensor, places: Places) -> Result:
    """Where a result of the recording is."""
    rows, width = tensor.shape
    where = places.of(tensor.data_ptr())
    return Result(where, rows, width, "float32" if tensor.dtype == torch.float32 else "uint16")
