"""Rounding that makes up for its errors: against the paper's equations in numpy, against rounding to nearest, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.compress.gptq import Factor, Order
from lineshaft.compress.gptq import gptq as rounded_by
from lineshaft.ops.formats import Integer

ORDERS: list[Order] = ["none", "activation"]
FORMATS = [Integer(bits, group, symmetric) for bits, symmetric in ((8, True), (4, True), (4, False)) for group in (None, 32, 128)]


def gptq(weight: Tensor, hessian: Tensor, fmt: Integer, damp: float = 0.01, block: int = 128, order: Order = "none") -> dict[str, Tensor]:
    """Factor and rounding in one."""
    return rounded_by(weight, Factor.of(hessian, damp, order), fmt, block)


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """What a quarter as many causes give, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    few = max(1, inputs // 4)
    causes, effects = torch.randn(tokens, few, generator=generator), torch.randn(few, inputs, generator=generator)
    return causes @ effects / few**0.5 + 0.3 * torch.randn(tokens, inputs, generator=generator)


def weight_of(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(x: Tensor, weight: Tensor, fmt: Integer, stored: dict[str, Tensor]) -> float:
    """||X W^T - X Q^T||."""
    return float((x.double() @ (weight - fmt.decode(stored, torch.float32)).double().T).norm())


# -- against the paper ------------------------------------------------------------------------------------------------


def scale_and_zero(rows: np.ndarray, fmt: Integer) -> tuple[np.ndarray, np.ndarray]:
    """Of each row; ordinary weights only, whose scales FP16 holds without trouble."""
    if fmt.symmetric:
        span = np.abs(rows).max(1) / (127 if fmt.bits == 8 else 7.5)
        return span.astype(np.float16).astype(np.float64), np.full(len(rows), 2 ** (fmt.bits - 1))
    least, largest = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    scale = ((largest - least) / 15).astype(np.float16).astype(np.float64)
    return scale, np.rint(-least / scale)


def one_by_one(weight: np.ndarray, hessian: np.ndarray, fmt: Integer, damp: float, order: Order) -> np.ndarray:
    """The rounded weight by equation 2 of the paper: an input's error goes to those not rounded yet, by the inverse of their part of H."""
    original, w, q = weight.copy(), weight.copy(), np.zeros_like(weight)
    hessian = hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian))
    width = fmt.group or len(hessian)
    places = list(range(len(hessian))) if order == "none" else sorted(range(len(hessian)), key=lambda j: -hessian[j, j])
    scales = {g: scale_and_zero(original[:, g : g + width], fmt) for g in range(0, len(hessian), width)}
    while places:
        j = places[0]
        if order == "none" and j % width == 0:
            scales[j] = scale_and_zero(w[:, j : j + width], fmt)
        scale, zero = scales[j // width * width]
        q[:, j] = (np.clip(np.rint(w[:, j] / scale) + zero, 0, 2**fmt.bits - 1) - zero) * scale
        inverse = np.linalg.inv(hessian[np.ix_(places, places)])
        w[:, places] -= np.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
        places = places[1:]
    return q


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("fmt", "inputs"),
    [
        (Integer(8, packing="int-quantized"), 3),
        (Integer(8, packing="int-quantized"), 5),
        (Integer(8), 4),
        (Integer(8, 4), 12),
        (Integer(4), 8),
        (Integer(4, 4), 8),
        (Integer(4, 4, symmetric=False), 8),
    ],
)
def test_few_inputs_are_rounded_as_the_papers_equations_say(fmt: Integer, inputs: int, order: Order) -> None:
    for seed in range(5):
        x, weight = correlated(40, inputs, seed).double(), weight_of(6, inputs, seed)
        x *= torch.linspace(0.5, 2, inputs).roll(seed)
        stored = gptq(weight, x.T @ x, fmt, damp=0.02, block=4, order=order)
        exact = one_by_one(weight.double().numpy(), (x.T @ x).numpy(), fmt, 0.02, order)
        np.testing.assert_allclose(fmt.decode(stored, torch.float32).double().numpy(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS, ids=Integer.describe)
def test_without_correlation_it_is_rounding_to_nearest(fmt: Integer, order: Order) -> None:
    weight = weight_of(9, 256)
    for hessian in (torch.eye(256), torch.diag(torch.linspace(0.1, 7, 256, dtype=torch.float64))):
        stored, nearest = gptq(weight, hessian, fmt, order=order), fmt.encode(weight)
        assert tuple(stored) == tuple(nearest)
        for name, tensor in nearest.items():
            assert stored[name].dtype == tensor.dtype
            assert torch.equal(stored[name], tensor)


# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS, ids=Integer.describe)
def test_outputs_change_less_than_by_rounding(fmt: Integer, order: Order) -> None:
    x, weight = correlated(1024, 256), weight_of(48, 256)
    stored = gptq(weight, x.T @ x, fmt, order=order)
    assert output_error(x, weight, fmt, stored) <= 0.7 * output_error(x, weight, fmt, fmt.encode(weight))


@settings(max_examples=20, deadline=None)
@given(
    fmt=st.sampled_from([Integer(8, 8), Integer(4, 8), Integer(4), Integer(4, 16, symmetric=False), Integer(8, packing="int-quantized")]),
    order=st.sampled_from(ORDERS),
    block=st.sampled_from([1, 8, 24, 500]),
    tokens=st.integers(3, 200),
    seed=st.integers(0, 10**6),
)
def test_outputs_never_change_more_than_by_rounding(fmt: Integer, order: Order, block: int, tokens: int, seed: int) -> None:
    """Also with fewer tokens than inputs."""
    x, weight = correlated(tokens, 48, seed), weight_of(16, 48, seed)
    stored = gptq(weight, x.T @ x, fmt, block=block, order=order)
    assert output_error(x, weight, fmt, stored) <= output_error(x, weight, fmt, fmt.encode(weight))


@pytest.mark.parametrize("fmt", [Integer(4, 32), Integer(4, 128), Integer(4, 32, symmetric=False), Integer(8, 32)], ids=Integer.describe)
def test_with_outlier_inputs_taken_first_the_error_is_less_than_half(fmt: Integer) -> None:
    """A few inputs thirty times as large, which the others tell much of: 0.33 to 0.34 of rounding's error was seen."""
    x, weight = correlated(1024, 256), weight_of(48, 256)
    x[:, [7, 100, 101, 250]] *= 30
    stored = gptq(weight, x.T @ x, fmt, order="activation")
    assert output_error(x, weight, fmt, stored) <= 0.5 * output_error(x, weight, fmt, fmt.encode(weight))


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Integer(4), Integer(4, 32), Integer(4, 128, symmetric=False)], ids=Integer.describe)
def test_blocks_are_for_speed_only(fmt: Integer) -> None:
    x, weight = correlated(512, 256), weight_of(32, 256)
    whole = fmt.integers(gptq(weight, x.T @ x, fmt, block=256)).codes_OI
    for block in (1, 48, 128):
        other = fmt.integers(gptq(weight, x.T @ x, fmt, block=block)).codes_OI
        assert (other == whole).float().mean() > 0.99, "sums in another order may move a weight that lies between two codes"


def test_the_size_of_the_hessian_and_what_was_handed_in_are_left_alone() -> None:
    x, weight = correlated(300, 64), weight_of(8, 64)
    hessian, fmt = x.T @ x, Integer(4, 32)
    kept, kept_weight = hessian.clone(), weight.clone()
    one, other = gptq(weight, hessian, fmt), gptq(weight.double(), hessian.double() / 1024, fmt)
    assert all(torch.equal(one[name], other[name]) for name in fmt.tensor_names)
    assert torch.equal(hessian, kept)
    assert torch.equal(weight, kept_weight)


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_that_were_always_zero_are_rounded_to_nearest_and_take_no_part(order: Order) -> None:
    x, weight, fmt = correlated(300, 64), weight_of(8, 64), Integer(8)
    dead = [0, 5, 63]
    x[:, dead] = 0
    codes = fmt.integers(gptq(weight, x.T @ x, fmt, order=order)).codes_OI
    nearest = fmt.integers(fmt.encode(weight)).codes_OI
    assert torch.equal(codes[:, dead], nearest[:, dead])
    assert not torch.equal(codes, nearest)
    assert torch.equal(fmt.integers(gptq(weight, torch.zeros(64, 64), fmt, order=order)).codes_OI, nearest)


# -- what is refused --------------------------------------------------------------------------------------------------


def with_smallest(share: float) -> Tensor:
    """A Hessian with the eigenvalue -share times the mean of its diagonal."""
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.linspace(0.5, 3, 32, dtype=torch.float64)
    values[0] = 0
    values[0] = -share * values.mean() / (1 + share / 32)
    return basis @ torch.diag(values) @ basis.T


def test_damping_rises_tenfold_until_the_factorisation_succeeds() -> None:
    weight, fmt = weight_of(8, 32), Integer(4, 32)
    for share, damp, needed in ((0.05, 0.01, 0.1), (0.05, 0.001, 0.1), (0.5, 0.01, 1.0), (0.5, 0.3, 1.0)):
        raised, given_so = gptq(weight, with_smallest(share), fmt, damp=damp), gptq(weight, with_smallest(share), fmt, damp=needed)
        assert all(torch.equal(raised[name], given_so[name]) for name in fmt.tensor_names)


def test_what_is_no_hessian_is_refused() -> None:
    weight, fmt = weight_of(8, 32), Integer(4, 32)
    with pytest.raises(ConfigError, match="not positive definite"):
        gptq(weight, with_smallest(1.5), fmt)
    with pytest.raises(ConfigError, match=r"a Hessian is square, not \[32, 31\]"):
        gptq(weight, torch.zeros(32, 31), fmt)
    with pytest.raises(ConfigError, match="not a number or infinite"):
        gptq(weight, torch.full((32, 32), torch.inf), fmt)
    for damp in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="damp"):
            gptq(weight, torch.eye(32), fmt, damp=damp)
    with pytest.raises(ConfigError, match="32 inputs are not a multiple of 64"):
        gptq(weight, torch.eye(32), Integer(4, 64))
