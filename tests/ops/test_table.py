"""Every kernel in the tables against its reference on random shapes, and every reference against arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.ops import reference, table
from lineshaft.ops.formats import Int8

Arguments = tuple[object, ...]
DTYPES = [torch.float32, torch.bfloat16]


class Shapes:
    """Draws the arguments of each op: odd widths, one row, pages half full."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def size(self, most: int) -> int:
        return int(self.draw(st.integers(1, most)))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def linear(self) -> Arguments:
        tokens, inputs, outputs = self.size(7), self.size(33), self.size(19)
        bias = self.randn(outputs) if self.draw(st.booleans()) else None
        return self.randn(tokens, inputs), self.randn(outputs, inputs), bias

    def linear_int8(self) -> Arguments:
        group, blocks, outputs = self.draw(st.sampled_from([None, 4, 32, 64])), self.size(3), self.size(19)
        inputs = blocks * (group or 4)
        stored = Int8(group).encode(self.randn(outputs, inputs, dtype=torch.float32))
        bias = self.randn(outputs) if self.draw(st.booleans()) else None
        return self.randn(self.size(7), inputs), stored["weight_packed"], stored["weight_scale"], bias

    def rms_norm(self) -> Arguments:
        lead, width = [self.size(5) for _ in range(self.draw(st.integers(1, 2)))], self.size(40)
        return self.randn(*lead, width) * self.draw(st.sampled_from([1e-3, 1, 100])), self.randn(width), 1e-6

    def rope(self) -> Arguments:
        tokens, heads, half = self.size(6), self.size(5), self.size(9)
        angles = self.randn(tokens, half, dtype=torch.float32) * 10
        return self.randn(tokens, heads, 2 * half), angles.cos(), angles.sin(), self.draw(st.booleans())

    def silu_mul(self) -> Arguments:
        shape = self.size(6), self.size(33)
        return self.randn(*shape) * 3, self.randn(*shape)

    def _paged(self) -> tuple[int, int, Tensor, int, int]:
        """Page size, pages, the request's table, its first new position, its new tokens."""
        page, tokens, first = self.size(5), self.size(4), self.draw(st.integers(0, 20))
        need = -(-(first + tokens) // page)
        pages = need + self.size(3)
        return page, pages, torch.randperm(pages, generator=self.generator)[:need], first, tokens

    def paged_gqa(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        kv, each, width = self.size(3), self.size(3), 2 * self.size(8)
        window = self.draw(st.none() | st.integers(1, 12))
        keys, values = self.randn(pages, page, kv, width), self.randn(pages, page, kv, width)
        return self.randn(tokens, kv * each, width), keys, values, places, first, width**-0.5, window

    def paged_mla(self) -> Arguments:
        page, pages, places, first, tokens = self._paged()
        heads, latent, rotary = self.size(4), self.size(17), 2 * self.size(4)
        queries = self.randn(tokens, heads, latent), self.randn(tokens, heads, rotary)
        return *queries, self.randn(pages, page, latent + rotary), places, first, (latent + rotary) ** -0.5


@st.composite
def arguments(draw: st.DrawFn, op: str, dtype: torch.dtype) -> Arguments:
    return getattr(Shapes(draw, dtype), op)()


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = max(1.0, expected.abs().max().item())
    return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


KERNELS = [
    pytest.param(
        device,
        op,
        marks=[] if device == "cpu" or torch.cuda.is_available() else pytest.mark.skip(reason=f"no {device} here"),
    )
    for device, kernels in table.BY_DEVICE.items()
    for op in kernels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "op"), KERNELS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_kernel_does_what_its_reference_does(device: str, op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, dtype))
    there = tuple(item.to(device) if isinstance(item, Tensor) else item for item in given_)
    before = [item.clone() for item in there if isinstance(item, Tensor)]
    got = getattr(table, op)(*there)
    assert got.dtype == given_[0].dtype
    assert close(got.cpu(), table.REFERENCE[op](*given_), dtype)
    after = [item for item in there if isinstance(item, Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "it wrote into its arguments"


def test_every_op_can_be_called_and_every_device_has_every_op() -> None:
    for device, kernels in table.BY_DEVICE.items():
        assert kernels.keys() == table.REFERENCE.keys()
        assert table.chosen(device).keys() == table.REFERENCE.keys()
    assert all(callable(getattr(table, op)) and table.REFERENCE[op] is getattr(reference, op) for op in table.REFERENCE)
    assert set(table.chosen("cpu").values()) <= {"reference", "native"}


def test_an_unknown_device_runs_the_reference() -> None:
    assert table.kernel("linear", torch.empty(1, device="meta")) is reference.linear


# -- the references, in float64 and in other words ---------------------------------------------------------------


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.einsum("ti,oi->to", x, weight) + (0 if bias is None else bias)


def exact_linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    codes = torch.tensor([[byte - 128 for word in row for byte in (word & 0xFFFFFFFF).to_bytes(4, "little")] for row in packed.tolist()])
    weight = codes.double() * scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    return exact_linear(x, weight, bias)


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As multiplication of complex numbers."""
    half, step = x.shape[-1] // 2, 2 if interleaved else 1
    first = [step * i for i in range(half)]
    second = [i + (1 if interleaved else half) for i in first]
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, None]
    out = torch.empty_like(x)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def exact_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def exact_paged_gqa(q: Tensor, pages_k: Tensor, pages_v: Tensor, places: Tensor, first: int, scale: float, window: int | None) -> Tensor:
    page, each, out = pages_k.shape[1], q.shape[1] // pages_k.shape[2], torch.empty_like(q)
    for token in range(len(q)):
        here = first + token
        seen = [position for position in range(here + 1) if window is None or here - position < window]
        for head in range(q.shape[1]):
            keys = torch.stack([pages_k[places[p // page], p % page, head // each] for p in seen])
            values = torch.stack([pages_v[places[p // page], p % page, head // each] for p in seen])
            out[token, head] = (keys @ q[token, head] * scale).softmax(0) @ values
    return out


def exact_paged_mla(q: Tensor, q_rope: Tensor, pages: Tensor, places: Tensor, first: int, scale: float) -> Tensor:
    """One key-value head whose value is the latent part of the key."""
    queries = torch.cat([q, q_rope], -1)
    seen = exact_paged_gqa(queries, pages[:, :, None], pages[:, :, None], places, first, scale, None)
    return seen[..., : q.shape[-1]]


EXACT: dict[str, Callable[..., Tensor]] = {
    "linear": exact_linear,
    "linear_int8": exact_linear_int8,
    "rms_norm": exact_rms_norm,
    "rope": exact_rope,
    "silu_mul": exact_silu_mul,
    "paged_gqa": exact_paged_gqa,
    "paged_mla": exact_paged_mla,
}


@pytest.mark.parametrize("op", table.REFERENCE)
@settings(max_examples=25)
@given(data=st.data())
def test_every_reference_is_right(op: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    doubled = tuple(item.double() if isinstance(item, Tensor) and item.is_floating_point() else item for item in given_)
    assert close(table.REFERENCE[op](*given_), EXACT[op](*doubled), torch.float32)


def test_silu_is_torchs() -> None:
    gate = torch.linspace(-20, 20, 101)
    assert torch.equal(reference.silu_mul(gate, torch.ones(101)), F.silu(gate))


def test_a_window_of_one_sees_itself_alone() -> None:
    seen = reference.visible_from(3, 2, 5, 1, torch.device("cpu"))
    assert seen.int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
