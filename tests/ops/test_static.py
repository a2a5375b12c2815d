"""Activations in 8 bits by one scale for all tokens: what is stored, what it means in compressed-tensors, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from integer_cases import KINDS, compressor_of, scheme_of
from native_cases import NEEDS_NATIVE

from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.ops import table
from lineshaft.ops.formats import Integer
from lineshaft.ops.packed import packed_of

STATIC = [replace(kind, activations="int8-static") for kind in KINDS]


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("largest", [1.0, 2.5, 9.0])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("kind", STATIC, ids=str)
def test_the_product_is_that_of_compressed_tensors(kind: Integer, group: int | None, largest: float) -> None:
    """Numbers of up to 4 are cut off, reached and left room: theirs go through its own rounding with the scale that is stored."""
    fmt, x = replace(kind, group=group), numbers(40, 256)
    stored = fmt.encode_static(numbers(64, 256, seed=4), largest)
    assert stored["input_scale"].item() == pytest.approx(largest / 127) and stored["input_scale"].dtype == torch.float32
    scheme: QuantizationScheme = scheme_of(fmt)
    assert scheme.input_activations is not None and not scheme.input_activations.dynamic
    whole = quantize(x, stored["input_scale"], torch.zeros(1, dtype=torch.int8), scheme.input_activations)
    assert whole.abs().max() == min(128, round(x.abs().max().item() / largest * 127)) or (whole.max() == 127 and whole.min() == -128)
    wide = {name: part for name, part in stored.items() if name != "input_scale"} | {"weight_scale": stored["weight_scale"].float()}
    weight = compressor_of(fmt).decompress(wide, scheme)["weight"]
    expected = F.linear(whole.double() * stored["input_scale"].double(), weight.double())
    assert torch.allclose(fmt.matmul(x, stored, None).double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STATIC, ids=str)
def test_packed_for_the_kernels_it_is_the_same_product(kind: Integer, dtype: torch.dtype) -> None:
    stored, x = kind.encode_static(numbers(70, 64), 1.5), numbers(9, 64, seed=5).to(dtype)
    made = packed_of(kind, stored)
    assert made is not None and made[0].input_scale == stored["input_scale"].item()
    with table.steady():
        got = made[0].matmul(x, {"packed": made[1]}, None)
    plain = packed_of(replace(kind, activations="int8"), stored)
    assert plain is not None
    with table.steady():
        assert not torch.allclose(got, plain[0].matmul(x, {"packed": plain[1]}, None), rtol=1e-3)
    torch.testing.assert_close(got, kind.matmul(x, stored, None), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_range_must_be_known_and_be_one() -> None:
    fmt = Integer(8, activations="int8-static")
    with pytest.raises(ConfigError, match="by one scale: the scale of activations comes from calibration: take the step `static`"):
        fmt.encode(numbers(4, 8))
    for largest in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="have no scale"):
            fmt.encode_static(numbers(4, 8), largest)
    silent = fmt.encode_static(numbers(4, 8), 0.0)
    assert fmt.matmul(torch.zeros(2, 8), silent, None).tolist() == [[0] * 4] * 2
    assert fmt.encode_static(numbers(4, 8), 1e-44)["input_scale"].item() > 0


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_a_stored_scale_that_can_be_none_is_refused(scale: float) -> None:
    fmt = Integer(8, activations="int8-static")
    stored = fmt.encode_static(numbers(4, 8), 1.0) | {"input_scale": torch.tensor([scale])}
    for use in (lambda: fmt.matmul(numbers(2, 8), stored, None), lambda: packed_of(fmt, stored)):
        with pytest.raises(BadCheckpoint, match="is no scale: the checkpoint is damaged or was not calibrated"):
            use()


def test_what_is_not_a_number_stays_in_its_token() -> None:
    fmt = Integer(8, activations="int8-static")
    x = numbers(3, 8)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    assert fmt.matmul(x, fmt.encode_static(numbers(5, 8), 1.0), None).isnan().any(1).tolist() == [False, True, True]
