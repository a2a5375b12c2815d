"""What the native kernels work on, drawn at random, and the instruction sets they are tried on.

Packed weights are copied into memory of their own: a read beyond their end is then one that a sanitizer sees.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from masks import reaches
from torch import Tensor

from lineshaft.ops import packing
from lineshaft.ops.integers import Integers
from lineshaft.ops.isa import library
from lineshaft.ops.packing import Shape
from lineshaft.ops.reach import Causal, Reach, Window

NEEDS_NATIVE = pytest.mark.skipif(library() is None, reason="native kernels are not built here, or LINESHAFT_ISA=none")
NAMES: list[str] = [] if library() is None else library().names()
ISAS = NAMES or [pytest.param("none", marks=NEEDS_NATIVE)]


@contextmanager
def on(isa: str, threads: int = 1) -> Generator[None]:
    """While it is open, that instruction set and so many threads; what was before comes back, whatever happens."""
    found = library()
    before = found.chosen(), found.threads()
    found.choose(isa)
    found.set_threads(threads)
    try:
        yield
    finally:
        found.choose(before[0])
        found.set_threads(before[1])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN and of the sign of zero."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@st.composite
def integers(draw: st.DrawFn, kind: str) -> Integers:
    """Any codes, grouped or by channel, with zero points that differ or in the middle."""
    luck = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    most, wide = (256, 4) if kind == "int8" else (16, 8)
    outputs, groups, width = draw(st.integers(1, 150)), draw(st.integers(1, 4)), wide * draw(st.integers(1, 9))
    codes = torch.randint(most, (outputs, groups * width), dtype=torch.uint8, generator=luck)
    scale = torch.rand(outputs, groups, generator=luck) / most
    zero = torch.full((outputs, groups), most // 2, dtype=torch.uint8)
    if draw(st.booleans()):
        zero = torch.randint(most, zero.shape, dtype=torch.uint8, generator=luck)
    return Integers(codes, scale, zero)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """FP8 weights of any number there is, the smallest ones too, their scales, and the block that shares one."""
    luck = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    outputs, groups, block = draw(st.integers(1, 150)), draw(st.integers(1, 4)), (draw(st.integers(1, 160)), 4 * draw(st.integers(1, 9)))
    codes = torch.randint(127, (outputs, groups * block[1]), dtype=torch.uint8, generator=luck)
    codes |= torch.randint(2, codes.shape, dtype=torch.uint8, generator=luck) << 7
    return codes.view(torch.float8_e4m3fn), torch.rand(-(-outputs // block[0]), groups, generator=luck) / 100, block


@st.composite
def weights(draw: st.DrawFn, kind: str, dtype: torch.dtype) -> tuple[Shape, Tensor]:
    """Packed: "dense" as `dtype`, "int8", "int4" or "float8"."""
    if kind == "dense":
        luck = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        made = packing.pack_dense(torch.randn(draw(st.integers(1, 150)), 4 * draw(st.integers(1, 30)), generator=luck).to(dtype))
    elif kind == "float8":
        made = packing.pack_fp8(*draw(blocks()))
    else:
        made = packing.pack_coded(draw(integers(kind)), 8 if kind == "int8" else 4)
    assert made is not None
    return made[0], made[1].clone()


@st.composite
def neighbours(draw: st.DrawFn, kind: str, dtype: torch.dtype, outputs: list[int]) -> list[tuple[Shape, Tensor]]:
    """`weights` of the same inputs, scales and kind of zero points."""
    luck = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    groups, width, zeros = draw(st.integers(1, 4)), (8 if kind == "int4" else 4) * draw(st.integers(1, 9)), draw(st.booleans())
    made = []
    for count in outputs:
        if kind == "dense":
            made.append(packing.pack_dense(torch.randn(count, groups * width, generator=luck).to(dtype)))
        elif kind == "float8":
            codes = torch.randint(127, (count, groups * width), dtype=torch.uint8, generator=luck)
            made.append(packing.pack_fp8(codes.view(torch.float8_e4m3fn), torch.rand(count, groups, generator=luck) / 100, (1, width)))
        else:
            most = 256 if kind == "int8" else 16
            codes = torch.randint(most, (count, groups * width), dtype=torch.uint8, generator=luck)
            zero = torch.full((count, groups), most // 2 - zeros, dtype=torch.uint8)
            made.append(packing.pack_coded(Integers(codes, torch.rand(count, groups, generator=luck) / most, zero), most.bit_length() - 1))
    return [(shape, packed.clone()) for shape, packed in made]


def read(packed: Tensor, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (or the dense weight), zeros and scales, each float64 [O, I], from the places that native/src/packed.h names."""
    raw, wide = packed.numpy(), {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8, "float8": 4}[shape.kind]
    o, i = np.arange(shape.outputs)[:, None], np.arange(shape.inputs)[None]
    inputs = shape.scale_inputs or shape.inputs
    header = 0 if not shape.scale_inputs else 64 * 4 + 64 * shape.zeros
    part = header + inputs // wide * 256
    start = (o // 64 * (shape.inputs // inputs) + i // inputs) * part
    word = start + header + i % inputs // wide * 256 + o % 64 * 4
    if not shape.scale_inputs:
        bits = raw.view(f"<u{4 // wide}")[word // (4 // wide) + i % wide].astype(np.uint32) << (16 if wide == 2 else 0)
        return bits.view(np.float32).astype(float), np.zeros((1, 1)), np.ones((1, 1))
    codes = raw[word + i % 4]
    if wide == 8:
        codes = np.where(i % 8 < 4, codes & 15, codes >> 4)
    scale = raw[(start + o % 64 * 4)[..., None] + np.arange(4)].copy().view(np.float32)[..., 0]
    if shape.kind == "float8":
        power, part8 = (codes >> 3 & 15).astype(int), (codes & 7) / 8
        sizes = np.where(power, np.ldexp(1 + part8, power - 7), np.ldexp(part8, -6))  # OCP 8-bit floating point, 1.0, section 5.2
        return np.where(codes & 128, -sizes, sizes), np.zeros(codes.shape), scale.astype(float)
    zero = raw[start + 64 * 4 + o % 64] if shape.zeros else np.full(codes.shape, 128 if wide == 4 else 8)
    return codes.astype(float), zero.astype(float), scale.astype(float)


@dataclass(frozen=True)
class World:
    """Requests over one set of pages: chunks and tables as paged_attention takes them."""

    page_tokens: int
    pages: int
    tokens: int
    chunks: Tensor
    tables: Tensor
    reach: Reach


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Some requests, each with up to two chunks; nobody sees what was given back; tables with gaps between them, or none at all."""
    reach = draw(reaches() | st.just(Causal()) | st.builds(Window, window=st.integers(20, 90), global_tokens=st.integers(0, 70)))
    size, luck = draw(st.sampled_from([1, 3, 16, 40])), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    lengths = draw(st.lists(st.tuples(st.sampled_from([0, 1, 20, 63, 64, 150]), st.integers(1, 40), st.integers(0, 3)), max_size=3))
    needs = [-(-(first + count + more) // size) for first, count, more in lengths]
    free = torch.randperm(sum(needs) + 2, generator=luck).int()
    chunks, tables, row, used = [], [torch.tensor([-1], dtype=torch.int32)], 0, 0
    for (first, count, more), need in zip(lengths, needs, strict=True):
        own, start = free[used : used + need].clone(), sum(map(len, tables))
        if draw(st.booleans()):
            give_back(own, reach, first, first + count + more, size)
        chunks += [(row, first, count, start), *([(row + count, first + count, more, start)] if more else [])]
        tables += [own, torch.tensor([-1], dtype=torch.int32)]
        row, used = row + count + more, used + need
    made = World(size, len(free), row, torch.tensor(chunks, dtype=torch.int64).view(-1, 4), torch.cat(tables), reach)
    return replace(made, tables=torch.stack([made.tables, made.tables + 1], 1)[:, 0]) if draw(st.booleans()) else made  # strided


def give_back(table: Tensor, reach: Reach, first: int, last: int, size: int) -> None:
    """Pages that hold nothing of what positions from `first` to before `last` see."""
    seen = {place // size for start, stop in reach.spans(first, last) for place in range(start, stop)}
    for page in set(range(len(table))) - seen:
        table[page] = -1
