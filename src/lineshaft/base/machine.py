"""What a measurement was taken on."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and the versions that speed depends on."""
    return {
        "processor": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "lineshaft": version("lineshaft"),
    }


def peak_memory_bytes() -> int:
    """Highest resident memory of this process since it was started.

    Linux: VmHWM. getrusage would also count what the parent had in memory when it started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, the one other system we run on


def resident_memory_bytes(process: int | None = None) -> int:
    """Resident memory now of this process, or of another by its number (0 when that has ended).

    Where the system does not tell (macOS): this process's peak, and 0 for others.
    """
    statm = Path(f"/proc/{'self' if process is None else process}/statm")
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # the second: it ended while we read
        return peak_memory_bytes() if process is None else 0


def available_memory_bytes() -> int:
    """What could be taken now without swapping: the least of what the system has and what each control group leaves.

    Linux: MemAvailable, and memory limits of cgroup v2 or v1. Elsewhere all physical memory.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return max(0, min(int(line.split()[1]) * 1024, *_left_by_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())))


_mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
_M_MMAP_THRESHOLD = -3  # of glibc's <malloc.h>


@contextmanager
def large_blocks_returned(least: int = 256 << 10) -> Iterator[None]:
    """Within it glibc takes blocks of `least` bytes and more straight from the system and gives them back when they are freed.

    Work that keeps a little of each large block it makes would otherwise leave a heap full of holes: compressing was
    measured to hold up to three times what it kept (docs/preflight.md). Other allocators are left as they are. Each page of
    such a block costs the system some microseconds anew, so `least` is larger where blocks come and go.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, least)
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # where the threshold comes to rest by itself once large blocks were freed


def _left_by_groups(mount: Path, membership: str) -> list[int]:
    """What the limits of this process's control groups and those above leave; `membership` as in /proc/self/cgroup.

    File pages that the kernel can drop count as free. A group without a limit, or that can't be read, is left out.
    """
    left = [1 << 62]
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        top = mount / "memory" if version_1 else mount
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
        group = top / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            values = [_number(folder / name) for name in (limit, used)]
            if values[0] is not None and values[1] is not None:
                left.append(values[0] - values[1] + _droppable(folder))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max", or no such group inside this container
        return None


def _droppable(group: Path) -> int:
    """Bytes of file pages that have not been used for a while."""
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


@cache
def made_by_amd() -> bool:
    """Is the processor AMD's? Their units for bf16 differ in speed from Intel's under the same name. False where Linux does not tell."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
