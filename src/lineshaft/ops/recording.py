"""Recording a model's step: its native calls, noted once and run again and again without Python between them.

While it is recorded nothing is computed. Results lie in buffers of an arena whose places are used again as soon as no tensor
holds them, as they will be in every run. What is not a native call would be missing from the runs, so it is refused.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft.base.errors import Unrecordable
from lineshaft.ops.isa import library

_VIEWS = {
    "alias", "as_strided", "contiguous", "detach", "expand", "flatten", "float", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
"""Operations of PyTorch that compute nothing, as long as they do not copy."""


class Arena:
    """Places for results, used again when the last tensor on them is gone."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = max(1, dtype.itemsize * torch.Size(shape).numel())
        block = min((block for block in self._free if block.numel() >= size), key=len, default=None)
        if block is None:
            block = torch.frombuffer((ctypes.c_char * (size + 64)).from_buffer(bytearray(size + 64)), dtype=torch.uint8)
            block = block[-block.data_ptr() % 64 :][:size]
            self._blocks.append(block)
        else:
            self._free = [other for other in self._free if other is not block]  # by identity: tensors compare number by number
        place = (ctypes.c_char * size).from_address(block.data_ptr())
        weakref.finalize(place, self._give_back, block)
        return torch.frombuffer(place, dtype=dtype).view(tuple(shape))

    def _give_back(self, block: Tensor) -> None:
        self._free.append(block)

    @property
    def size(self) -> int:
        """Bytes of all places."""
        return sum(len(block) for block in self._blocks)


_arena: ContextVar[Arena | None] = ContextVar("arena", default=None)


def result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where a native kernel puts its result."""
    arena = _arena.get()
    return torch.empty(tuple(shape), dtype=dtype) if arena is None else arena.take(shape, dtype)


class Recorded:
    """The native calls of one function over tokens: `run(tokens)` computes for the first so many rows of its buffers.

    `finish` goes on with what the function gave, for a number of rows of its own: logits, which few tokens need.
    """

    def __init__(self, run: Callable[[], Tensor], finish: Callable[[Tensor], Tensor] = lambda output: output) -> None:
        """Record both. Raises Unrecordable. `output` and `finished`: their results, filled by each run."""
        native: Any = library()
        self.arena = Arena()
        token = _arena.set(self.arena)
        native.begin_step()
        try:
            with _OnlyViews():  # type: ignore[no-untyped-call] # torch leaves its modes untyped
                self.output = run()
                native.finish_step()
                self.finished = finish(self.output)
        finally:
            self._step = native.end_step()
            _arena.reset(token)

    def __len__(self) -> int:
        return len(self._step)

    def run(self, tokens: int, rows: int = 0) -> None:
        """Compute, and finish the first `rows`."""
        self._step.run(tokens, rows)


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves its modes untyped
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler at the first operation, most of a second of a server's start."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            raise Unrecordable(name)
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
            raise Unrecordable(f"{name}, which copied")
        return made
