"""Packed weights: the same bytes from C++ and from PyTorch, at the places that native/src/packed.h names, and back again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_cases import NEEDS_NATIVE, blocks, integers, on, read, same_bits
from torch import Tensor

from lineshaft.ops import isa, packing
from lineshaft.ops.fp8 import spread_blocks, unpack_fp8
from lineshaft.ops.integers import Integers
from lineshaft.ops.packing import Shape

SIZES = {"outputs": st.integers(1, 200), "inputs": st.integers(1, 40).map(lambda count: 4 * count), "seed": st.integers(0, 10**6)}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["native", "pytorch"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and isa.library() is None:
        pytest.skip("native kernels are not built here, or LINESHAFT_ISA=none")
    return str(request.param)


def packed_by(
    way: str, weight: Tensor | Integers, bits: int = 0, fp8: tuple[Tensor, tuple[int, int]] | None = None
) -> tuple[Shape, Tensor] | None:
    with pytest.MonkeyPatch.context() as patch:
        if way == "pytorch":
            patch.setattr(packing, "library", lambda: None)
        if fp8 is not None:
            return packing.pack_fp8(weight, *fp8)
        return packing.pack_coded(weight, bits) if isinstance(weight, Integers) else packing.pack_dense(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(**SIZES)
def test_a_dense_weight_comes_back(way: str, dtype: torch.dtype, outputs: int, inputs: int, seed: int) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shape, packed = packed_by(way, weight)
    assert same_bits(packing.unpack(packed, shape), weight)
    assert torch.equal(torch.from_numpy(read(packed, shape)[0]), weight.double())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(data=st.data())
def test_codes_come_back(way: str, kind: str, data: st.DataObject) -> None:
    weight = data.draw(integers(kind))
    shape, packed = packed_by(way, weight, 8 if kind == "int8" else 4)
    assert same_bits(packing.unpack(packed, shape), weight.decode(torch.float32))
    codes, zero, scale = map(torch.from_numpy, read(packed, shape))
    spread = [each.repeat_interleave(shape.scale_inputs, 1).double() for each in (weight.zero_OG, weight.scale_OG)]
    assert torch.equal(codes, weight.codes_OI.double())
    assert torch.equal(scale, spread[1])
    assert torch.equal(zero.expand_as(codes), spread[0])
    assert shape.zeros == bool((weight.zero_OG != (128 if kind == "int8" else 8)).any())


@given(data=st.data())
def test_fp8_comes_back(way: str, data: st.DataObject) -> None:
    weight, scale, block = data.draw(blocks())
    shape, packed = packed_by(way, weight, fp8=(scale, block))
    assert same_bits(packing.unpack(packed, shape), unpack_fp8(weight, scale, block, torch.float32))
    codes, zero, scales = map(torch.from_numpy, read(packed, shape))
    assert torch.equal(codes, weight.double()) and not zero.any()
    assert torch.equal(scales, spread_blocks(scale, weight.shape, block).double())


def test_fp8_that_the_kernels_can_not_take_is_left(way: str) -> None:
    weight, scale = torch.ones(6, 12).to(torch.float8_e4m3fn), torch.ones(1, 2)
    assert packed_by(way, weight, fp8=(scale, (6, 8))) is None  # the last block is smaller
    assert packed_by(way, weight, fp8=(torch.ones(1, 1), (6, 128))) is not None  # there is but one
    weight[3, 5] = torch.nan
    assert packed_by(way, weight, fp8=(torch.ones(1, 1), (6, 128))) is None


@NEEDS_NATIVE
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "float8"])
@given(data=st.data())
def test_both_ways_give_the_same_bytes(kind: str, data: st.DataObject) -> None:
    if kind == "dense":
        sizes = {name: data.draw(size) for name, size in SIZES.items()}
        luck = torch.Generator().manual_seed(sizes["seed"])
        weight, bits = torch.randn(sizes["outputs"], sizes["inputs"], generator=luck).to(data.draw(st.sampled_from(DTYPES))), 0
    elif kind == "float8":
        weight, *fp8 = data.draw(blocks())
        bits = 0
    else:
        weight, bits = data.draw(integers(kind)), 8 if kind == "int8" else 4
    with on(data.draw(st.sampled_from(isa.library().names())), threads=data.draw(st.integers(1, 3))):
        ours = packed_by("native", weight, bits, fp8 if kind == "float8" else None)
    theirs = packed_by("pytorch", weight, bits, fp8 if kind == "float8" else None)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])
    assert len(ours[1]) == isa.library().packed_bytes(*ours[0].native)


def test_strided_weights_and_scales_are_packed_as_they_read(way: str) -> None:
    wide = torch.randn(140, 60)
    (shape, packed), (_, wanted) = packed_by(way, wide[::2, 4:52]), packed_by(way, wide[::2, 4:52].contiguous())
    assert torch.equal(packed, wanted)
    assert torch.equal(packing.unpack(packed, shape), wide[::2, 4:52])
    weight = Integers(
        torch.randint(16, (64, 70), dtype=torch.uint8).T, torch.rand(4, 70).T, torch.randint(16, (4, 70), dtype=torch.uint8).T
    )
    shape, packed = packed_by(way, weight, 4)
    assert torch.equal(packing.unpack(packed, shape), weight.decode(torch.float32))


@pytest.mark.parametrize(
    "weight", [torch.randn(8, 8).half(), torch.randn(8, 6), torch.randn(8, 6).bfloat16(), torch.randn(8, 2**16), torch.randn(8, 8).double()]
)
def test_what_the_kernels_cannot_take_is_not_packed(way: str, weight: Tensor) -> None:
    assert packed_by(way, weight) is None


@pytest.mark.parametrize(("bits", "inputs", "groups"), [(8, 12, 2), (4, 24, 2), (4, 12, 1)])
def test_groups_that_end_within_a_row_are_not_packed(way: str, bits: int, inputs: int, groups: int) -> None:
    codes = torch.zeros(8, inputs, dtype=torch.uint8)
    scale, zero = torch.ones(8, groups), torch.zeros(8, groups, dtype=torch.uint8)
    assert packed_by(way, Integers(codes, scale, zero), bits) is None


def test_an_empty_place_of_the_last_group_is_zero(way: str) -> None:
    shape, packed = packed_by(way, torch.ones(65, 4))
    assert packed.view(torch.float32).sum() == 65 * 4
    wider = replace(shape, outputs=128)
    assert torch.equal(packing.unpack(packed, wider)[65:], torch.zeros(63, 4))
