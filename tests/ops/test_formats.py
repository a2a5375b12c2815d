"""INT8 against numpy in float64; the layout against compressed-tensors' own packing; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops import table
from lineshaft.ops.formats import DENSE, Int8, from_compressed_tensors, to_compressed_tensors

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
    fmt = Int8(group)
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
    error = Int8(group).decode(Int8(group).encode(weight), torch.float32) - weight
    assert error.abs().max() < weight.abs().max() / 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 32])
def test_what_is_stored_has_the_shapes_that_are_reserved(dtype: torch.dtype, group: int | None) -> None:
    stored, reserved = Int8(group).encode(torch.randn(6, 96).to(dtype)), Int8(group).empty(6, 96)
    assert tuple(stored) == tuple(reserved) == Int8(group).tensor_names
    assert all(stored[name].shape == reserved[name].shape and stored[name].dtype == reserved[name].dtype for name in stored)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert stored["weight_shape"].tolist() == [6, 96]
    assert Int8(group).decode(stored, dtype).dtype == dtype


def test_zero_weights_stay_zero() -> None:
    for group in (None, 4):
        assert Int8(group).decode(Int8(group).encode(torch.zeros(3, 8)), torch.float32).eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e8])
@pytest.mark.parametrize("group", [None, 4])
def test_weights_that_have_no_scale_are_refused(value: float, group: int | None) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 5] = value
    with pytest.raises(ConfigError, match="not a number or too large for INT8"):
        Int8(group).encode(weight)


@pytest.mark.parametrize(("inputs", "group", "unit"), [(48, 32, 32), (6, None, 4), (6, 3, 4), (30, 64, 64), (6, 6, 4)])
def test_inputs_that_do_not_divide_are_refused(inputs: int, group: int | None, unit: int) -> None:
    for ask in (lambda: Int8(group).encode(torch.zeros(2, inputs)), lambda: Int8(group).empty(2, inputs)):
        with pytest.raises(ConfigError, match=f"{inputs} inputs are not a multiple of {unit}"):
            ask()


def test_groups_of_32_take_eight_and_a_half_bits() -> None:
    weight = torch.randn(512, 512)
    share = sum(tensor.nbytes for tensor in Int8(32).encode(weight).values()) / weight.nbytes
    assert share == pytest.approx(0.265625, rel=0.005)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 32])
def test_the_product_is_that_with_the_decoded_weight(group: int | None, dtype: torch.dtype, bias: bool) -> None:
    fmt, x = Int8(group), torch.randn(5, 64).to(dtype)
    stored, b = fmt.encode(torch.randn(7, 64)), torch.randn(7).to(dtype) if bias else None
    expected = x.double() @ fmt.decode(stored, torch.float32).double().T + (0 if b is None else b.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    got = fmt.matmul(x, stored, b)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert torch.equal(got, table.linear(x, fmt.decode(stored, dtype), b))


@pytest.mark.parametrize("fmt", [Int8(), Int8(32)])
def test_a_description_comes_back_as_the_same_formats(fmt: Int8) -> None:
    formats = {"a": fmt, "b": DENSE, "c": fmt}
    config = to_compressed_tensors(formats)
    assert config is not None
    assert from_compressed_tensors(config, formats) == formats
    assert to_compressed_tensors({"a": DENSE}) is None
    with pytest.raises(ConfigError, match="different quantised formats"):
        to_compressed_tensors({"a": Int8(), "b": Int8(32)})


def test_patterns_in_ignore_are_read() -> None:
    config = to_compressed_tensors({"a": Int8()}) or {}
    config["ignore"] = ["re:.*down_proj", "lm_head"]
    read = from_compressed_tensors(config, ["layer.down_proj", "layer.up_proj", "lm_head", "xlm_head"])
    assert read == {"layer.down_proj": DENSE, "layer.up_proj": Int8(), "lm_head": DENSE, "xlm_head": Int8()}
    config["ignore"] = None
    assert from_compressed_tensors(config, ["lm_head"]) == {"lm_head": Int8()}


def _spoilt(path: str, value: Any) -> dict[str, Any]:
    config: Any = to_compressed_tensors({"a": Int8(32)})
    *parts, last = path.split("/")
    here = config
    for part in parts:
        here = here[part]
    here[last] = value
    return dict(config)


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("quant_method", "fp8", 'quantization by "fp8"'),
        ("quant_method", "gptq", 'quantization by "gptq"'),
        ("format", "int-quantized", "format 'int-quantized'"),
        ("quantization_status", "frozen", "quantization_status"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("transform_config", {"config_groups": {"u": 1}}, "transform_config"),
        ("config_groups", {}, "0 config_groups"),
        (f"{GROUP}/targets", ["re:.*self_attn.*"], "targets"),
        (f"{GROUP}/input_activations", {"num_bits": 8}, "input_activations"),
        (f"{GROUP}/weights/num_bits", 4, "num_bits 4"),
        (f"{GROUP}/weights/type", "float", "type 'float'"),
        (f"{GROUP}/weights/symmetric", False, "symmetric False"),
        (f"{GROUP}/weights/strategy", "tensor", "strategy 'tensor'"),
        (f"{GROUP}/weights/actorder", "group", "actorder 'group'"),
    ],
)
def test_schemes_that_we_do_not_read_are_named(path: str, value: Any, told: str) -> None:
    with pytest.raises(UnsupportedModel, match="supported: weight-only symmetric INT8") as caught:
        from_compressed_tensors(_spoilt(path, value), ["a"])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config_groups", None),
        ("config_groups", [1]),
        (GROUP, {}),
        (f"{GROUP}/weights", None),
        (f"{GROUP}/weights", {"num_bits": 8}),
        (f"{GROUP}/weights/group_size", "all"),
        (f"{GROUP}/weights/group_size", 0),
        ("ignore", 3),
        ("ignore", ["re:("]),
    ],
)
def test_a_broken_description_is_refused(path: str, value: Any) -> None:
    with pytest.raises(BadCheckpoint, match="quantization_config"):
        from_compressed_tensors(_spoilt(path, value), ["a"])


def test_a_description_that_is_no_table_is_refused() -> None:
    for broken in ([], "int8", 8):
        with pytest.raises(BadCheckpoint, match="quantization_config"):
            from_compressed_tensors(broken, ["a"])
