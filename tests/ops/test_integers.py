"""Integer weights: layouts and layers against compressed-tensors, rounding against float64, products exact and the same in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_cases import GROUPS, KINDS, compressor_of, exact_weight, integers, scheme_of
from op_cases import DTYPES, arguments
from test_formats import KINDS as WEIGHTS
from test_formats import weight_of
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.ops import reference, table
from lineshaft.ops.formats import Integer
from lineshaft.ops.integers import pack, rounded, unpack

SIZES = {"outputs": st.integers(1, 19), "blocks": st.integers(1, 3), "seed": st.integers(0, 10**6)}


# -- layouts -----------------------------------------------------------------------------------------------------


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack(words, bits)[:, :columns], codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)
    assert not unpack(words, bits)[:, columns:].any()


@settings(max_examples=60)
@given(fmt=integers(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), **SIZES)
def test_compressed_tensors_decodes_to_our_weight(fmt: Integer, dtype: torch.dtype, outputs: int, blocks: int, seed: int) -> None:
    """In the dtype of the scales, as it does: with float32 ones to the bit, with others but for their rounding."""
    stored = fmt.encode(weight_of("normal", outputs, 64 * blocks, seed))
    stored["weight_scale"] = stored["weight_scale"].to(dtype)
    theirs = compressor_of(fmt).decompress(stored, scheme_of(fmt))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(fmt.decode(stored, dtype), theirs)
    codes = stored.get("weight_packed", stored.get("weight"))
    exact = exact_weight(codes, stored["weight_scale"], stored.get("weight_zero_point"), fmt.bits)
    assert torch.equal(fmt.decode(stored, torch.float32), exact.float())


@settings(max_examples=60)
@given(fmt=integers(), **SIZES)
def test_compressed_tensors_writes_the_same_tensors(fmt: Integer, outputs: int, blocks: int, seed: int) -> None:
    """Given our scales and zeros it finds our codes, and packs them and the zeros as we do."""
    weight = weight_of("normal", outputs, 64 * blocks, seed)
    ours, plain = fmt.encode(weight), fmt.integers(fmt.encode(weight))
    zero = (plain.zero_OG.int() - 2 ** (fmt.bits - 1)).to(torch.int8)
    given_ = {"weight": weight, "weight_scale": plain.scale_OG, "weight_zero_point": zero}
    theirs = compressor_of(fmt).compress(given_, scheme_of(fmt))
    theirs["weight_scale"] = theirs["weight_scale"].half()
    assert theirs.keys() == ours.keys() == set(fmt.tensor_names)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_stored_has_the_shapes_that_are_reserved(kind: Integer, group: int | None) -> None:
    fmt = replace(kind, group=group)
    for outputs in (1, 6, 8, 17):
        stored, reserved = fmt.encode(torch.randn(outputs, 192)), fmt.empty(outputs, 192)
        assert tuple(stored) == tuple(reserved) == fmt.tensor_names
        assert all(stored[name].shape == reserved[name].shape and stored[name].dtype == reserved[name].dtype for name in stored)
        assert all(tensor.is_contiguous() for tensor in stored.values())
        plain = fmt.integers(stored)
        assert (plain.codes_OI.dtype, plain.scale_OG.dtype, plain.zero_OG.dtype) == (torch.uint8, torch.float32, torch.uint8)
        assert (plain.codes_OI.shape, plain.zero_OG.shape) == ((outputs, 192), plain.scale_OG.shape)
        assert not fmt.symmetric or plain.zero_OG.eq(2 ** (fmt.bits - 1)).all()


@given(fmt=integers(), **SIZES)
def test_codes_chosen_elsewhere_are_stored_as_they_are(fmt: Integer, outputs: int, blocks: int, seed: int) -> None:
    generator, groups = torch.Generator().manual_seed(seed), fmt.groups(64 * blocks)
    codes, zero = (torch.randint(0, 2**fmt.bits, (outputs, n), generator=generator).to(torch.uint8) for n in (64 * blocks, groups))
    scale, zero = (
        torch.rand(outputs, groups, generator=generator).half(),
        torch.full_like(zero, 2 ** (fmt.bits - 1)) if fmt.symmetric else zero,
    )
    stored, reserved = fmt.store(codes, scale, zero), fmt.empty(outputs, 64 * blocks)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in reserved.items()
    }
    plain = fmt.integers(stored)
    assert torch.equal(plain.codes_OI, codes)
    assert torch.equal(plain.scale_OG, scale.float())
    assert torch.equal(plain.zero_OG, zero)


# -- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(max_examples=15)
@given(fmt=integers(), **SIZES)
def test_no_weight_is_further_than_half_a_step_from_its_code(kind: str, fmt: Integer, outputs: int, blocks: int, seed: int) -> None:
    weight = weight_of(kind, outputs, 64 * blocks, seed)
    if kind == "huge":
        weight /= 32  # FP16 has no scale for more in 4 bits
    if not fmt.symmetric:
        weight = weight + weight.abs().max() * 0.7  # what zero points are for
    stored = fmt.encode(weight)
    plain = fmt.integers(stored)
    step = plain.scale_OG.double().repeat_interleave(weight.shape[1] // plain.scale_OG.shape[1], 1)
    assert ((fmt.decode(stored, torch.float32).double() - weight.double()).abs() <= step * 0.52).all()
    assert fmt.decode(stored, torch.float32)[weight == 0].eq(0).all()
    if not fmt.symmetric:
        # the scale in FP16 below its normal numbers is as coarse as it is
        spans = weight.unflatten(1, (plain.scale_OG.shape[1], -1))
        spans = spans.amax(-1).clamp(min=0) - spans.amin(-1).clamp(max=0)
        assert ((plain.scale_OG * 15 - spans).abs() <= spans * 1e-3 + 15 * 2.0**-24).all()


def test_four_bits_symmetric_use_finer_steps_than_their_largest_code() -> None:
    stored = Integer(4).encode(torch.tensor([[7.5, -7.5, 3.2, 0, 1, 2, 3, 4]]))
    assert stored["weight_scale"].item() == 1
    assert Integer(4).decode(stored, torch.float32).tolist() == [[7, -8, 3, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e8])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_that_have_no_scale_are_refused(kind: Integer, value: float) -> None:
    weight = torch.zeros(3, 16)
    weight[1, 5] = value
    for fmt in (kind, replace(kind, group=8)):
        with pytest.raises(ConfigError, match=f"not a number or too large for INT{kind.bits}"):
            fmt.encode(weight)


@pytest.mark.parametrize(
    ("fmt", "inputs", "unit"),
    [
        (Integer(4), 12, 8),
        (Integer(4, 32), 48, 32),
        (Integer(4, 4), 12, 8),
        (Integer(4, symmetric=False), 4, 8),
        (Integer(8, 5, packing="int-quantized"), 12, 5),
    ],
)
def test_inputs_that_do_not_divide_are_refused(fmt: Integer, inputs: int, unit: int) -> None:
    for ask in (lambda: fmt.encode(torch.zeros(2, inputs)), lambda: fmt.empty(2, inputs)):
        with pytest.raises(ConfigError, match=f"int{fmt.bits}: {inputs} inputs are not a multiple of {unit}"):
            ask()


def test_a_byte_a_weight_fits_any_number_of_inputs() -> None:
    fmt, weight = Integer(8, 5, packing="int-quantized"), torch.randn(3, 15)
    assert (fmt.decode(fmt.encode(weight), torch.float32) - weight).abs().max() < weight.abs().max() / 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 2},
        {"bits": 8, "symmetric": False},
        {"bits": 4, "packing": "int-quantized"},
        {"bits": 8, "symmetric": False, "packing": "int-quantized"},
        {"bits": 8, "packing": "marlin"},
    ],
)
def test_combinations_that_are_not_supported_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="are not supported"):
        Integer(**wrong)


@pytest.mark.parametrize(("fmt", "bits"), [(Integer(4, 32), 4.5), (Integer(4, 128), 4.125), (Integer(4, 32, symmetric=False), 4.625)])
def test_bits_a_weight(fmt: Integer, bits: float) -> None:
    stored = fmt.encode(torch.randn(512, 512))
    assert 8 * sum(tensor.nbytes for tensor in stored.values()) / 512**2 == pytest.approx(bits, abs=0.001)


def test_formats_say_what_they_are() -> None:
    assert Integer(8).describe() == Integer(8, packing="int-quantized").describe() == "int8, one scale a channel"
    assert Integer(4, 32, False).describe() == "int4, one scale and zero point a group of 32"
    assert Integer(8, activations="int8").describe() == "int8, one scale a channel, int8 activations"


# -- products ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(fmt=integers("int8"), dtype=st.sampled_from(DTYPES), **SIZES)
def test_the_product_is_that_of_compressed_tensors_given_our_scale(
    fmt: Integer, dtype: torch.dtype, outputs: int, blocks: int, seed: int
) -> None:
    """Its own scale is max|x| / 127.5; given ours, it rounds a token to the same numbers."""
    stored = fmt.encode(weight_of("normal", outputs, 64 * blocks, seed))
    stored["weight_scale"] = stored["weight_scale"].float()
    x = torch.randn(5, 64 * blocks, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[3] = 0
    scheme = scheme_of(fmt)
    assert scheme.input_activations is not None
    scale = rounded(x)[1]
    seen = fake_quantize(x.float(), scale, torch.zeros_like(scale), scheme.input_activations)
    weight = compressor_of(fmt).decompress(stored, scheme)["weight"]
    expected = F.linear(seen.double(), weight.double())
    got = fmt.matmul(x, stored, None)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_layer_is_that_of_compressed_tensors_but_for_its_scale(kind: Integer, group: int | None) -> None:
    """forward_quantize, as its layers run: steps of max|x| / 127.5 instead of 127 move a number by a part of a step."""
    fmt, x = replace(kind, group=group, activations="int8"), torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    stored, scheme = fmt.encode(torch.randn(64, 256, generator=torch.Generator().manual_seed(4))), scheme_of(fmt)
    seen = _theirs(x, scheme)
    expected = F.linear(seen, compressor_of(fmt).decompress(stored, scheme)["weight"].float())
    got, plain = fmt.matmul(x, stored, None), replace(fmt, activations=None).matmul(x, stored, None)
    rounding = (expected - plain).norm()
    assert 0 < (got - expected).norm() < 2 * rounding
    assert (got - plain).norm() == pytest.approx(rounding.item(), rel=0.15)


def _theirs(x_TI: Tensor, scheme: QuantizationScheme) -> Tensor:
    layer = torch.nn.Identity()
    layer.quantization_status = QuantizationStatus.FROZEN
    return forward_quantize(layer, x_TI[None], "input", scheme.input_activations)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear_int", "linear_int_a8"])
@settings(max_examples=40)
@given(data=st.data())
def test_a_row_has_the_same_bits_alone_and_in_any_company(op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    x, *others = data.draw(arguments(op, dtype))
    row, company = data.draw(st.integers(0, len(x) - 1)), data.draw(st.integers(0, 40))
    crowd = torch.cat([torch.randn(company, x.shape[1]).to(dtype) * 1e3, x, torch.randn(3, x.shape[1]).to(dtype)])
    with table.steady():
        assert torch.equal(getattr(table, op)(x[row : row + 1], *others)[0], getattr(table, op)(crowd, *others)[company + row])


@pytest.mark.parametrize(("bits", "zero", "inputs"), [(8, None, 1024), (8, None, 5000), (4, 0, 20000), (4, 15, 4096), (4, None, 4096)])
@pytest.mark.parametrize("top", [0, 255])
def test_sums_of_the_largest_numbers_are_exact(bits: int, zero: int | None, inputs: int, top: int) -> None:
    """One input is a step off: a sum that was rounded on the way would lose it."""
    codes = torch.full((1, inputs), top % 2**bits, dtype=torch.uint8)
    codes[0, -1] ^= 1
    middle = 2 ** (bits - 1) if zero is None else zero
    zeros = None if zero is None else pack(torch.full((1, 1), zero, dtype=torch.uint8), bits)
    expected = 127 * int((codes.long() - middle).sum())
    bias = torch.tensor([1.0 - expected], dtype=torch.float64)
    got = reference.linear_int_a8(torch.full((1, inputs), 127.0), pack(codes, bits), torch.ones(1, 1), zeros, bits, bias)
    assert got.item() == 1


def test_what_is_not_a_number_stays_in_its_token() -> None:
    stored = Integer(8).encode(torch.randn(5, 8))
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    got = Integer(8, activations="int8").matmul(x, stored, None)
    assert got.isnan().any(1).tolist() == [False, True, False]


def test_ties_go_to_even_numbers_and_small_tokens_do_not_vanish() -> None:
    q, scale = rounded(torch.tensor([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [127e-20, 5e-21, 1e-20, -1e-20], [1e-45, 0, 0, -1e-45]]))
    assert q[:3].tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [127, 0, 1, -1]]
    assert scale[:, 0].tolist() == [1, 1, pytest.approx(1e-20), 1]
    assert q[3].tolist() == [0, 0, 0, 0]


def test_dequantize_of_compressed_tensors_is_what_is_meant() -> None:
    """The oracle itself, on numbers that can be checked by eye: (code - zero) * scale."""
    args = scheme_of(Integer(4, 8, symmetric=False)).weights
    codes, scale, zero = torch.tensor([[-8, 7, 0, 1, 2, 3, 4, 5]], dtype=torch.int8), torch.tensor([[0.5]]), torch.tensor([[-8]])
    assert dequantize(codes, scale, zero, args).tolist() == [[0, 7.5, 4, 4.5, 5, 5.5, 6, 6.5]]
