"""Recording a model's step: its native calls, noted once and run again and again without Python between them.

While it is recorded nothing is computed. Results lie in buffers of an arena whose places are used again as soon as no tensor
holds them, as they will be in every run. What is not a native call would be missing from the runs, so it is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft.base.errors import Unrecordable
from lineshaft.ops.isa import STEP_CALLS, library

_VIEWS = {
    "alias", "as_strided", "contiguous", "detach", "expand", "flatten", "float", "lift_fresh", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
"""Operations of PyTorch that compute nothing, as long as they do not copy."""


class Arena:
    """Places for results, used again when the last tensor on them is gone."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = max(1, dtype.itemsize * torch.Size(shape).numel())
        block = min((block for block in self._free if block.numel() >= size), key=len, default=None)
        if block is None:
            block = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # takes memory only where it is touched
            self.blocks.append(block)
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
        return sum(len(block) for block in self.blocks)


Call = tuple[str, tuple[Any, ...]]
"""A function of the library, and its arguments: addresses, numbers, and lists of both."""


class _Noting:
    """The library while a step is recorded: the calls that make the step are noted as well."""

    def __init__(self, native: Any, calls: list[Call]) -> None:
        self._native, self._calls = native, calls

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._native, name)
        if name not in STEP_CALLS:
            return call

        def noted(*args: Any) -> None:
            self._calls.append((name, args))
            call(*args)

        return noted


class _Now:
    """A recording that is going on."""

    def __init__(self, native: Any) -> None:
        self.arena, self.calls = Arena(), list[Call]()
        self.library = _Noting(native, self.calls)


_now: ContextVar[_Now | None] = ContextVar("recording", default=None)


def result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where a native kernel puts its result."""
    now = _now.get()
    return torch.empty(tuple(shape), dtype=dtype) if now is None else now.arena.take(shape, dtype)


def native_library() -> Any:
    """The library for kernels, which the table holds only where it is there."""
    now, found = _now.get(), library()
    assert found is not None
    return found if now is None else now.library


class Recorded:
    """The native calls of one function over tokens: `run(tokens)` computes for the first so many rows of its buffers.

    `finish` goes on with what the function gave, for a number of rows of its own: logits, which few tokens need.
    """

    def __init__(self, run: Callable[[], Tensor], finish: Callable[[Tensor], Tensor] = lambda output: output) -> None:
        """Record both. Raises Unrecordable. `output` and `finished`: their results, filled by each run. `calls`: of the library, of which
        the first `body` belong to `run`."""
        native: Any = library()
        now = _Now(native)
        self.arena, self.calls = now.arena, now.calls
        token = _now.set(now)
        native.begin_step()
        try:
            with _OnlyViews():  # type: ignore[no-untyped-call] # torch leaves its modes untyped
                self.output = run()
                native.finish_step()
                self.body = len(self.calls)
                self.finished = finish(self.output)
        finally:
            self.step: Any = native.end_step()
            _now.reset(token)

    def __len__(self) -> int:
        return len(self.step)

    def run(self, tokens: int, rows: int = 0) -> None:
        """Compute, and finish the first `rows`."""
        self.step.run(tokens, rows)


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
