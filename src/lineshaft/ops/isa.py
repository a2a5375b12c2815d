"""The library of native kernels: whether it is there, and which instruction set it uses.

It is built at installation when there is a C++ compiler. Threads are those of torch's own OpenMP, whose functions are
handed over by address: a second pool would spin on the same cores. Free of torch, whose OpenMP is found without importing it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lineshaft.base.errors import ConfigError

FORCE = "LINESHAFT_ISA"
"""Environment variable: a lower instruction set than the best, or `none` for PyTorch alone."""
MISSING = "native kernels are not installed: install g++ and cmake, then run the installation again; until then PyTorch computes, slower"

STEP_CALLS: Mapping[str, frozenset[int]] = {
    name: frozenset(places)
    for name, places in {
        "linear": (5, 6, 9, 11, 16),
        "linears": (5, 6, 9, 11),
        "swiglu": (5, 6, 9, 11),
        "norm": (1, 4, 6),
        "layer_norm": (1, 4, 6, 8),
        "rope": (1, 4, 5, 7),
        "silu_mul": (1, 2, 3),
        "add": (1, 2, 3),
        "take_rows": (0, 2, 3),
        "put_rows": (0, 3, 4),
        "angles": (0, 1, 5, 6),
        "write_codes": (1, 4, 5),
        "attention": (2, 4, 7, 11, 12, 13, 23),
        "choose_keys": (1, 2, 3, 6, 7, 8, 17, 20, 21, 22),
        "by_head": (3, 5, 8),
        "join": (0, 4, 8),
        "sigmoid": (1, 2),
        "scaled": (1, 2, 3),
        "widen": (0, 1),
        "route": (0, 1, 9, 10),
        "experts": (4, 7, 9, 10, 11),
    }.items()
}
"""Functions of the library that a recorded step is made of (native/src/module.cpp, bind_experts.cpp), and which of their arguments are
addresses, or lists of them. 0 is one that is not given."""

_library: ModuleType | None = None
_tried = False
_passed_over: list[str] = []
"""Better instruction sets that failed their trial, and in what."""


def library() -> Any | None:
    """The library, ready to run; None where it is not built or LINESHAFT_ISA=none.

    Raises ConfigError for an instruction set that is unknown, or forced and wrong on this processor.
    """
    global _library, _tried  # noqa: PLW0603 # found once; a process has one processor
    if not _tried:
        _library = _load()
        _tried = True
    return _library


def describe() -> str:
    """One line for people: the instruction set in use, or why there is none."""
    found = library()
    if found is None:
        return f"native kernels are switched off by {FORCE}=none" if os.environ.get(FORCE) == "none" else f"warning: {MISSING}"
    emulated = "; its tiles are emulated, for tests" if found.soft_tiles and found.chosen() == "amx" else ""
    warning = f"warning: wrong products on this processor, so not used: {'; '.join(_passed_over)}; " if _passed_over else ""
    return f"{warning}native kernels: {found.chosen()} of {', '.join(found.names())}; threads: {found.threads()}{emulated}"


def _load() -> ModuleType | None:
    wanted = os.environ.get(FORCE)
    if wanted == "none":
        return None
    try:
        found = importlib.import_module("lineshaft._native")
    except ModuleNotFoundError as error:
        if error.name != "lineshaft._native":
            raise
        return None
    if wanted is not None and wanted not in found.names():
        raise ConfigError(f"{FORCE}={wanted}: this processor runs {', '.join(found.names())}, or none for PyTorch alone")
    found.choose(wanted or _best(found))
    if wanted is not None and (differs := found.trial(wanted)):
        raise ConfigError(f"{FORCE}={wanted}: wrong products on this processor ({differs}): force another or none, and report it")
    _share_threads(found)
    return found


def _best(found: Any) -> str:
    """The best instruction set whose trial products are right. The portable one, which is first, is what they are compared with."""
    _passed_over.clear()
    for name in reversed(found.names()):
        differs = found.trial(name)
        if not differs:
            return str(name)
        _passed_over.append(f"{name} ({differs})")
    raise AssertionError("the portable instruction set differs from itself")


def _share_threads(found: ModuleType) -> None:
    """Hand over the functions of torch's OpenMP; without them (another runtime than GNU's) there is one thread, which `describe` shows.

    As many threads as torch uses, where it is imported, else as OpenMP would; `follow_torch` when it is imported later.
    """
    torch, most = sys.modules.get("torch"), 1
    spec = importlib.util.find_spec("torch")
    for path in sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*")) if spec and spec.origin else []:
        openmp = ctypes.CDLL(str(path))
        names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
        found.share_threads(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value for name in names))
        most = openmp.omp_get_max_threads()
        break
    told = getattr(torch, "get_num_threads", None)  # there is none while another thread still imports it
    found.set_threads(told() if told else most)


def follow_torch(threads: int) -> None:
    """Use as many threads as torch does. A start that was kept, and then refused, may have chosen others."""
    if (found := library()) is not None:
        found.set_threads(threads)
