"""Which kernel runs an op: the device of the tensor chooses, and what was chosen can be printed.

To add a kernel put it into the table of its device under the name of its reference; `tests/ops` then compares the two
on random shapes. There is no silent fallback: `chosen` names the kernel of every op, and start-up prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lineshaft.ops import reference

Kernel = Callable[..., Tensor]

REFERENCE: Mapping[str, Kernel] = {
    "linear": reference.linear,
    "linear_int8": reference.linear_int8,
    "rms_norm": reference.rms_norm,
    "rope": reference.rope,
    "silu_mul": reference.silu_mul,
    "paged_gqa": reference.paged_gqa,
    "paged_mla": reference.paged_mla,
}
"""Right on every device."""

BY_DEVICE: Mapping[str, Mapping[str, Kernel]] = {"cpu": REFERENCE, "cuda": REFERENCE}
"""Device type to its kernels. Native tables are laid over the reference here."""


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return kernel("rms_norm", x)(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `reference.rope`."""
    return kernel("rope", x)(x, cos, sin, interleaved)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return kernel("silu_mul", gate)(gate, up)


def paged_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, table: Tensor, first: int, scale: float, window: int | None) -> Tensor:
    """See `reference.paged_gqa`."""
    return kernel("paged_gqa", q)(q, pages_k, pages_v, table, first, scale, window)


def paged_mla(q: Tensor, q_rope: Tensor, pages: Tensor, table: Tensor, first: int, scale: float) -> Tensor:
    """See `reference.paged_mla`."""
    return kernel("paged_mla", q)(q, q_rope, pages, table, first, scale)
