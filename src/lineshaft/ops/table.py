"""Which kernel runs an op: the device of the tensor chooses, and what was chosen can be printed.

To add a kernel put it into the table of its device under the name of its reference; `tests/ops` then compares the two
on random shapes. There is no silent fallback: `chosen` names the kernel of every op, and start-up prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from lineshaft.ops import cpu, native, native_experts, native_linear, reference, reference_indexer, reference_packed
from lineshaft.ops import steady as steady_kernels
from lineshaft.ops.experts import Feeds, Rule
from lineshaft.ops.isa import library
from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.packing import Shape
from lineshaft.ops.reach import Reach

Kernel = Callable[..., Any]

REFERENCE: Mapping[str, Kernel] = {
    "linear": reference.linear,
    "linear_int": reference.linear_int,
    "linear_int_a8": reference.linear_int_a8,
    "linear_fp8": reference.linear_fp8,
    "rms_norm": reference.rms_norm,
    "layer_norm": reference.layer_norm,
    "rope": reference.rope,
    "silu_mul": reference.silu_mul,
    "add": reference.add,
    "embed": reference.embed,
    "angles": reference.angles,
    "sigmoid": reference.sigmoid,
    "rows_gqa": reference.rows_gqa,
    "attention": reference.attention,
    "reach_gqa": reference.reach_gqa,
    "paged_rows": reference.paged_rows,
    "paged_gqa": reference.paged_gqa,
    "paged_mla": reference.paged_mla,
    "paged_chosen_mla": reference.paged_chosen_mla,
    "by_head": reference.by_head,
    "tile_gqa": reference.tile_gqa,
    "tile_mla": reference.tile_mla,
    "scaled": reference.scaled,
    "widen": reference.widen,
    "join": reference.join,
    "packed_by_head": reference_packed.packed_by_head,
    "route": reference.route,
    "experts": reference_packed.experts,
    "packed_linear": reference_packed.packed_linear,
    "packed_linears": reference_packed.packed_linears,
    "packed_swiglu": reference_packed.packed_swiglu,
    "write_pages": reference.write_pages,
    "paged_attention": reference.paged_attention,
    "choose_keys": reference_indexer.choose_keys,
    "write_codes": reference.write_codes,
    "coded_attention": reference.coded_attention,
    "sample": reference.sample,
}
"""Right on every device."""

CPU: Mapping[str, Kernel] = {
    "linear": cpu.linear,
    "rows_gqa": cpu.rows_gqa,
    "reach_gqa": cpu.reach_gqa,
    "paged_gqa": cpu.paged_gqa,
}
"""Faster on processors; every other op runs its reference there."""

STEADY: Mapping[str, Kernel] = {
    "linear": steady_kernels.linear,
    "linear_int": steady_kernels.linear_int,
    "linear_fp8": steady_kernels.linear_fp8,
    "silu_mul": steady_kernels.silu_mul,
    "sigmoid": steady_kernels.sigmoid,
    "by_head": steady_kernels.by_head,
    "route": steady_kernels.route,
    "tile_gqa": steady_kernels.tile_gqa,
    "tile_mla": steady_kernels.tile_mla,
}
"""On processors, the same bits for a row in any company; every other op gives them anyhow, as the engine calls it."""

NATIVE: Mapping[str, Kernel] = {
    "packed_linear": native_linear.packed_linear,
    "packed_linears": native_linear.packed_linears,
    "packed_swiglu": native_linear.packed_swiglu,
    "rms_norm": native.rms_norm,
    "layer_norm": native.layer_norm,
    "rope": native.rope,
    "silu_mul": native.silu_mul,
    "add": native.add,
    "embed": native.embed,
    "angles": native.angles,
    "sigmoid": native_experts.sigmoid,
    "scaled": native_experts.scaled,
    "widen": native_experts.widen,
    "join": native_experts.join,
    "packed_by_head": native_experts.packed_by_head,
    "route": native_experts.route,
    "experts": native_experts.experts,
    "write_pages": native.write_pages,
    "paged_attention": native.paged_attention,
    "choose_keys": native.choose_keys,
    "write_codes": native.write_codes,
    "coded_attention": native.coded_attention,
    "sample": native.sample,
}
"""Of the library in native/, laid over STEADY where it is built: as steady, and fast. They keep no gradients."""

BY_DEVICE: Mapping[str, Mapping[str, Kernel]] = {"cpu": {**REFERENCE, **CPU}, "cuda": REFERENCE}
"""Device type to its kernels, laid over the reference."""


_tables: ContextVar[Mapping[str, Mapping[str, Kernel]]] = ContextVar("tables", default=BY_DEVICE)


@contextmanager
def steady(wanted: bool = True) -> Generator[None]:
    """While it is open, products on processors give a row the same bits in any company (ops/steady.py, ops/native.py)."""
    token = _tables.set(_steady_tables() if wanted else BY_DEVICE)
    try:
        yield
    finally:
        _tables.reset(token)


def _steady_tables() -> Mapping[str, Mapping[str, Kernel]]:
    return {**BY_DEVICE, "cpu": {**REFERENCE, **STEADY, **(NATIVE if library() else {})}}


def kernel(op: str, x: Tensor) -> Callable[..., Tensor]:
    """The kernel of `op` for the device on which `x` lies; other device types run the reference."""
    return _tables.get().get(x.device.type, REFERENCE)[op]


def chosen(device: str) -> dict[str, str]:
    """Op to the module its kernel comes from (native of native_experts); the server prints it when it starts."""
    return {op: run.__module__.rsplit(".", 1)[-1].partition("_")[0] for op, run in sorted(_tables.get().get(device, REFERENCE).items())}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    return kernel("linear", x)(x, weight, bias)


def linear_int(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None) -> Tensor:
    """See `reference.linear_int`."""
    return kernel("linear_int", x)(x, codes, scale, zero, bits, bias)


def linear_int_a8(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None, input_scale: float = 0.0
) -> Tensor:
    """See `reference.linear_int_a8`."""
    return kernel("linear_int_a8", x)(x, codes, scale, zero, bits, bias, input_scale)


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, block: tuple[int, int], bias: Tensor | None) -> Tensor:
    """See `reference.linear_fp8`."""
    return kernel("linear_fp8", x)(x, weight, scale, block, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return kernel("rms_norm", x)(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `reference.layer_norm`."""
    return kernel("layer_norm", x)(x, weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `reference.rope`."""
    return kernel("rope", x)(x, cos, sin, interleaved)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return kernel("silu_mul", gate)(gate, up)


def add(x: Tensor, y: Tensor) -> Tensor:
    """See `reference.add`."""
    return kernel("add", x)(x, y)


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """See `reference.embed`."""
    return kernel("embed", weight)(tokens, weight)


def angles(positions: Tensor, speed: Tensor, length: float) -> Tensor:
    """See `reference.angles`."""
    return kernel("angles", positions)(positions, speed, length)


def sigmoid(x: Tensor) -> Tensor:
    """See `reference.sigmoid`."""
    return kernel("sigmoid", x)(x)


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


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.by_head`."""
    return kernel("by_head", x)(x, weight)


def tile_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, slots: Tensor, seen: Tensor, scale: float) -> Tensor:
    """See `reference.tile_gqa`."""
    return kernel("tile_gqa", q)(q, pages_k, pages_v, slots, seen, scale)


def tile_mla(q: Tensor, pages: Tensor, slots: Tensor, seen: Tensor, scale: float, latent: int) -> Tensor:
    """See `reference.tile_mla`."""
    return kernel("tile_mla", q)(q, pages, slots, seen, scale, latent)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    shape: Shape,
    bias: Tensor | None,
    whole: bool,
    wide: bool = False,
    input_scale: float = 0.0,
    added: Tensor | None = None,
) -> Tensor:
    """See `reference_packed.packed_linear`."""
    return kernel("packed_linear", x)(x, packed, shape, bias, whole, wide, input_scale, added)


def packed_linears(x: Tensor, weights: Neighbours) -> tuple[Tensor, ...]:
    """See `reference_packed.packed_linears`."""
    return tuple(kernel("packed_linears", x)(x, weights))


def packed_swiglu(x: Tensor, gate_and_up: Neighbours) -> Tensor:
    """See `reference_packed.packed_swiglu`."""
    return kernel("packed_swiglu", x)(x, gate_and_up)


def write_pages(pages: Tensor, slots: Tensor, entry: Tensor) -> Tensor:
    """See `reference.write_pages`."""
    return kernel("write_pages", pages)(pages, slots, entry)


def paged_attention(
    q: Tensor, pages_k: Tensor, pages_v: Tensor, chunks: Tensor, tables: Tensor, scale: float, reach: Reach, count: Tensor | None = None
) -> Tensor:
    """See `reference.paged_attention`."""
    return kernel("paged_attention", q)(q, pages_k, pages_v, chunks, tables, scale, reach, count)


def choose_keys(
    q: Tensor,
    weight: Tensor,
    pages: Tensor,
    chunks: Tensor,
    tables: Tensor,
    top_k: int,
    reach: Reach,
    longest: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference_indexer.choose_keys`."""
    slots, found, tokens = kernel("choose_keys", q)(q, weight, pages, chunks, tables, top_k, reach, longest, count)
    return slots, found, tokens


def write_codes(pages: Tensor, slots: Tensor, entry: Tensor) -> Tensor:
    """See `reference.write_codes`."""
    return kernel("write_codes", pages)(pages, slots, entry)


def coded_attention(
    q: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    values: int,
    chunks: Tensor,
    tables: Tensor,
    scale: float,
    reach: Reach,
    count: Tensor | None = None,
) -> Tensor:
    """See `reference.coded_attention`."""
    return kernel("coded_attention", q)(q, pages_k, pages_v, values, chunks, tables, scale, reach, count)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """See `reference.scaled`."""
    return kernel("scaled", x)(x, factor)


def widen(x: Tensor) -> Tensor:
    """See `reference.widen`."""
    return kernel("widen", x)(x)


def join(a: Tensor, b: Tensor) -> Tensor:
    """See `reference.join`."""
    return kernel("join", a)(a, b)


def packed_by_head(x: Tensor, packed: Tensor, shape: Shape) -> Tensor:
    """See `reference_packed.packed_by_head`."""
    return kernel("packed_by_head", x)(x, packed, shape)


def route(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    weight, expert = kernel("route", logits)(logits, bias, rule)
    return weight, expert


def experts(x: Tensor, weight: Tensor, expert: Tensor, feeds: Feeds) -> Tensor:
    """See `reference_packed.experts`."""
    return kernel("experts", x)(x, weight, expert, feeds)


def sample(logits: Tensor, choices: Tensor) -> Tensor:
    """See `reference.sample`."""
    return kernel("sample", logits)(logits, choices)
