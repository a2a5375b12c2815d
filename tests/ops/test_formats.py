"""INT8 and FP8 against numpy in float64; INT8's layout against compressed-tensors' own packing; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from lineshaft.base.errors import ConfigError
from lineshaft.ops import table
from lineshaft.ops.formats import Fp8Block, Integer

KINDS = ["normal", "tiny", "subnormal", "huge", "zero rows", "one outlier", "steps"]


def weight_of(kind: str, outputs: int, inputs: int, seed: int) -> Tensor:
    """Weights as they come, and as they come in the worst of models."""
    x = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "zero rows":
        x[::2] = 0
    if kind == "one outlier":
        x[0, 0] = 1000.0
    if kind == "steps":
        x = (x * 40).round().clamp(-127, 127) / 64
    return x * {"tiny": 1e-4, "subnormal": 2e-6, "huge": 1e6}.get(kind, 1.0)


def numpy_oracle(weight: Tensor, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(scales in FP16, nearest codes) worked out in float64."""
    w = weight.double().numpy()
    grouped = w.reshape(w.shape[0], -1, group or w.shape[1])
    exact = np.abs(grouped).max(-1) / 127
    scales = np.maximum(exact, 2.0**-24).astype(np.float16)
    scales = np.where(scales.astype(np.float64) * 127.5 < exact * 127, scales.astype(np.float64) + 2.0**-24, scales).astype(np.float16)
    return scales, (grouped / scales.astype(np.float64)[..., None])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(group=st.sampled_from([None, 32, 64, 4]), outputs=st.integers(1, 9), blocks=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_int8_is_the_nearest_code_and_no_worse_than_half_a_step(kind: str, group: int | None, outputs: int, blocks: int, seed: int) -> None:
    weight = weight_of(kind, outputs, 64 * blocks, seed)
    fmt = Integer(8, group)
    stored = fmt.encode(weight)
    scales, places = numpy_oracle(weight, group)
    assert np.array_equal(stored["weight_scale"].numpy(), scales)
    codes = unpack_from_int32(stored["weight_packed"], 8, weight.shape).numpy().reshape(places.shape)
    assert np.abs(codes).max() <= 127
    assert np.abs(codes - places).max() <= 0.5 + 1e-4  # a tie may fall either way in float32
    decoded = fmt.decode(stored, torch.float32).double().numpy().reshape(places.shape)
    assert np.array_equal(decoded, codes.astype(np.float64) * scales.astype(np.float64)[..., None])
    step = scales.astype(np.float64)[..., None]
    assert (np.abs(decoded - weight.double().numpy().reshape(places.shape)) <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("group", [None, 32])
def test_small_weights_keep_eight_bits(group: int | None) -> None:
    """Scales below FP16's smallest normal number, 6e-5, must not be lifted to it: trained models have such channels."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 2e-4
    error = Integer(8, group).decode(Integer(8, group).encode(weight), torch.float32) - weight
    assert error.abs().max() < weight.abs().max() / 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 32])
def test_what_is_stored_has_the_shapes_that_are_reserved(dtype: torch.dtype, group: int | None) -> None:
    stored, reserved = Integer(8, group).encode(torch.randn(6, 96).to(dtype)), Integer(8, group).empty(6, 96)
    assert tuple(stored) == tuple(reserved) == Integer(8, group).tensor_names
    assert all(stored[name].shape == reserved[name].shape and stored[name].dtype == reserved[name].dtype for name in stored)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert stored["weight_shape"].tolist() == [6, 96]
    assert Integer(8, group).decode(stored, dtype).dtype == dtype


def test_zero_weights_stay_zero() -> None:
    for group in (None, 4):
        assert Integer(8, group).decode(Integer(8, group).encode(torch.zeros(3, 8)), torch.float32).eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e8])
@pytest.mark.parametrize("group", [None, 4])
def test_weights_that_have_no_scale_are_refused(value: float, group: int | None) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 5] = value
    with pytest.raises(ConfigError, match="not a number or too large for INT8"):
        Integer(8, group).encode(weight)


@pytest.mark.parametrize(("inputs", "group", "unit"), [(48, 32, 32), (6, None, 4), (6, 3, 4), (30, 64, 64), (6, 6, 4)])
def test_inputs_that_do_not_divide_are_refused(inputs: int, group: int | None, unit: int) -> None:
    for ask in (lambda: Integer(8, group).encode(torch.zeros(2, inputs)), lambda: Integer(8, group).empty(2, inputs)):
        with pytest.raises(ConfigError, match=f"{inputs} inputs are not a multiple of {unit}"):
            ask()


def test_groups_of_32_take_eight_and_a_half_bits() -> None:
    weight = torch.randn(512, 512)
    share = sum(tensor.nbytes for tensor in Integer(8, 32).encode(weight).values()) / weight.nbytes
    assert share == pytest.approx(0.265625, rel=0.005)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 32])
def test_the_product_is_that_with_the_decoded_weight(group: int | None, dtype: torch.dtype, bias: bool) -> None:
    fmt, x = Integer(8, group), torch.randn(5, 64).to(dtype)
    stored, b = fmt.encode(torch.randn(7, 64)), torch.randn(7).to(dtype) if bias else None
    expected = x.double() @ fmt.decode(stored, torch.float32).double().T + (0 if b is None else b.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    got = fmt.matmul(x, stored, b)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert torch.equal(got, table.linear(x, fmt.decode(stored, dtype), b))


# -- FP8 ---------------------------------------------------------------------------------------------------------

BLOCKS = st.sampled_from([(128, 128), (16, 16), (4, 8), (3, 5), (1, 7), (64, 1)])
_MAGNITUDES = {(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)} - {480.0}
E4M3 = np.array([sign * magnitude for sign in (-1, 1) for magnitude in _MAGNITUDES])
"""Every number of float8_e4m3fn, from its definition (Micikevicius et al. 2022, table 1); the largest pattern is NaN."""


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The scale of each element, by its index."""
    rows, columns = np.indices(shape)
    return scale[rows // block[0], columns // block[1]]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(block=BLOCKS, outputs=st.integers(1, 40), inputs=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_fp8_is_the_nearest_code_and_its_largest_weight_is_exact(
    kind: str, block: tuple[int, int], outputs: int, inputs: int, seed: int
) -> None:
    weight = weight_of(kind, outputs, inputs, seed)
    fmt = Fp8Block(block)
    stored = fmt.encode(weight)
    w = weight.double().numpy()
    scale = stored["weight_scale_inv"].double().numpy()
    for row, column in np.ndindex(*scale.shape):
        largest = np.abs(w[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]).max()
        assert scale[row, column] == (np.float32(np.float32(largest) / np.float32(448)) if largest else 1)
    places = w / spread(scale, w.shape, block)
    codes = stored["weight"].double().numpy()
    assert np.isin(codes, E4M3).all()
    nearest = np.abs(E4M3[:, None, None] - places).min(0)
    assert (np.abs(codes - places) <= nearest * (1 + 1e-5) + 1e-5).all()
    decoded = fmt.decode(stored, torch.float32)
    assert np.array_equal(decoded.numpy(), (codes * spread(scale, w.shape, block)).astype(np.float32))


@given(block=BLOCKS, outputs=st.integers(1, 40), inputs=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_any_codes_and_scales_decode_to_their_product(block: tuple[int, int], outputs: int, inputs: int, seed: int) -> None:
    """Codes that another tool chose, NaN left out."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (outputs, inputs), dtype=torch.uint8, generator=generator)
    codes = (codes + 128 * torch.randint(0, 2, codes.shape, dtype=torch.uint8, generator=generator)).view(torch.float8_e4m3fn)
    scale = Fp8Block(block).empty(outputs, inputs)["weight_scale_inv"].normal_(generator=generator).exp_() / 1000
    got = Fp8Block(block).decode({"weight": codes, "weight_scale_inv": scale}, torch.float32)
    exact = codes.double().numpy() * spread(scale.double().numpy(), (outputs, inputs), block)
    assert np.array_equal(got.numpy(), exact.astype(np.float32))


class Quantizer:
    def __init__(self, block: tuple[int, int], scale_fmt: str) -> None:
        self.quantization_config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (8, 16)])
def test_transformers_decodes_and_encodes_the_same(block: tuple[int, int], power_of_two: bool, dtype: torch.dtype) -> None:
    fmt, theirs = Fp8Block(block, power_of_two), Quantizer(block, "ue8m0" if power_of_two else "float")
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[:128, :128] = 0
    ours = fmt.encode(weight)
    made = Fp8Quantize(theirs).convert({"weight": weight})
    assert torch.allclose(ours["weight_scale_inv"], made["weight_scale_inv"].float(), rtol=3e-7, atol=0)
    same = ours["weight"].view(torch.uint8) == made["weight"].view(torch.uint8)
    assert same.float().mean() > (0.9999 if not power_of_two else 0.99999), (
        "its scale is the reciprocal of a reciprocal: ties fall elsewhere"
    )
    decoded = Fp8Dequantize(theirs)._dequantize_one(ours["weight"], ours["weight_scale_inv"], dtype)
    assert torch.equal(fmt.decode(ours, dtype), decoded)


@given(exponent=st.integers(-100, 100), mantissa=st.floats(1, 2, exclude_max=True, width=32))
def test_a_power_of_two_is_the_next_one(exponent: int, mantissa: float) -> None:
    largest = mantissa * 2.0**exponent
    scale = Fp8Block(power_of_two=True).encode(torch.tensor([[largest]]))["weight_scale_inv"].item()
    assert np.frexp(scale)[0] == 0.5
    exact = np.float32(largest) / np.float32(448)
    assert exact <= scale < 2 * exact


def test_fp8_reserves_the_shapes_that_it_stores() -> None:
    for shape in ((6, 96), (130, 257), (128, 128), (1, 1)):
        stored, reserved = Fp8Block().encode(torch.randn(shape)), Fp8Block().empty(*shape)
        assert tuple(stored) == tuple(reserved) == Fp8Block().tensor_names
        assert all(stored[name].shape == reserved[name].shape and stored[name].dtype == reserved[name].dtype for name in stored)
        assert all(tensor.is_contiguous() for tensor in stored.values())


def test_fp8_encodes_what_it_decoded_to_the_same_codes() -> None:
    first = Fp8Block((16, 16)).encode(torch.randn(50, 70))
    again = Fp8Block((16, 16)).encode(Fp8Block((16, 16)).decode(first, torch.float32))
    assert torch.equal(first["weight"].view(torch.uint8), again["weight"].view(torch.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_rounds_numbers_that_float32_itself_holds_coarsely_and_makes_no_nan_of_them(power_of_two: bool) -> None:
    for exponent in range(-149, -110):
        weight = torch.tensor([[0.75, -1.0, 0.3]]) * 2.0**exponent
        decoded = Fp8Block(power_of_two=power_of_two).decode(Fp8Block(power_of_two=power_of_two).encode(weight), torch.float32)
        assert ((decoded - weight).abs() <= weight.abs() / 16 + 2.0**-136).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_fp8_refuses_what_it_can_not_hold(value: float) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 5] = value
    with pytest.raises(ConfigError, match="not a number or infinite"):
        Fp8Block((2, 2)).encode(weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fp8_product_is_that_with_the_decoded_weight(dtype: torch.dtype, bias: bool) -> None:
    fmt, x = Fp8Block((4, 16)), torch.randn(5, 70).to(dtype)
    stored, b = fmt.encode(torch.randn(7, 70)), torch.randn(7).to(dtype) if bias else None
    got = fmt.matmul(x, stored, b)
    assert got.dtype == dtype
    assert torch.equal(got, table.linear(x, fmt.decode(stored, dtype), b))
