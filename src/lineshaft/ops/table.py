"""Which kernel runs an op: the device of the tensor chooses, and what was chosen can be printed.

To add a kernel put it into the table of its device under the name of its reference; `tests/ops` then compares the two
on random shapes. There is no silent fallback: `chosen` names the kernel of every op, and start-up prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lineshaft.ops import cpu, reference
from lineshaft.ops.reach import Reach

Kernel = Callable[..., Tensor]

REFERENCE: Mapping[str, Kernel] = {
    "linear": reference.linear,
    "linear_int8": reference.linear_int8,
    "linear_fp8": reference.linear_fp8,
    "rms_norm": reference.rms_norm,
    "rope": reference.rope,
    "silu_mul": reference.silu_mul,
    "rows_gqa": reference.rows_gqa,
    "attention": reference.attention,
    "reach_gqa": reference.reach_gqa,
    "paged_rows": reference.paged_rows,
    "paged_gqa": reference.paged_gqa,
    "paged_mla": reference.paged_mla,
    "paged_chosen_mla": reference.paged_chosen_mla,
}
"""Right on every device."""

CPU: Mapping[str, Kernel] = {
    "linear": cpu.linear,
    "rows_gqa": cpu.rows_gqa,
    "reach_gqa": cpu.reach_gqa,
    "paged_gqa": cpu.paged_gqa,
}
"""Faster on processors; every other op runs its reference there."""

BY_DEVICE: Mapping[str, Mapping[str, Kernel]] = {"cpu": {**REFERENCE, **CPU}, "cuda": REFERENCE}
"""Device type to its kernels, laid over the reference."""


def kernel(op: str, x: Tensor) -> Kernel:
    """The kernel of `op` for the device on which `x` lies; other device types run the reference."""
    return BY_DEVICE.get(x.device.type, REFERENCE)[op]


def chosen(device: str) -> dict[str, str]:
    """Op to the module its kernel comes from; the server prints it when it starts."""
    return {op: run.__module__.rsplit(".", 1)[-1] for op, run in sorted(BY_DEVICE.get(device, REFERENCE).items())}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    return kernel("linear", x)(x, weight, bias)


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear_int8`."""
    return kernel("linear_int8", x)(x, packed, scale, bias)


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, block: tuple[int, int], bias: Tensor | None) -> Tensor:
    """See `reference.linear_fp8`."""
    return kernel("linear_fp8", x)(x, weight, scale, block, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return kernel("rms_norm", x)(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `reference.rope`."""
    return kernel("rope", x)(x, cos, sin, interleaved)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return kernel("silu_mul", gate)(gate, up)


def rows_gqa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """See `reference.rows_gqa`."""
    return kernel("rows_gqa", q)(q, k, v, seen, scale)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """See `reference.attention`."""
    return kernel("attention", q)(q, k, v, seen, scale)


def reach_gqa(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach) -> Tensor:
    """See `reference.reach_gqa`."""
    return kernel("reach_gqa", q)(q, k, v, scale, reach)


def paged_rows(pages: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See `reference.paged_rows`."""
    return kernel("paged_rows", pages)(pages, table, positions)


def paged_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, table: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """See `reference.paged_gqa`."""
    return kernel("paged_gqa", q)(q, pages_k, pages_v, table, first, scale, reach)


def paged_mla(q: Tensor, q_rope: Tensor, pages: Tensor, table: Tensor, first: int, scale: float, reach: Reach) -> Tensor:
    """See `reference.paged_mla`."""
    return kernel("paged_mla", q)(q, q_rope, pages, table, first, scale, reach)


def paged_chosen_mla(q: Tensor, q_rope: Tensor, pages: Tensor, table: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """See `reference.paged_chosen_mla`."""
    return kernel("paged_chosen_mla", q)(q, q_rope, pages, table, chosen, scale)
