"""The native kernels on every instruction set: right, exact against float64, true to NaN and infinity, strict about their input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact_ops import EXACT
from expert_cases import as_one
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, NEEDS_NATIVE, on
from op_cases import DTYPES, arguments, close
from torch import Tensor

from lineshaft.ops import checks, native, native_linear, packing, reference, reference_packed, table
from lineshaft.ops.integers import Integers
from lineshaft.ops.isa import library
from lineshaft.ops.reach import Causal, Window

pytestmark = NEEDS_NATIVE
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@pytest.mark.parametrize("op", table.NATIVE)
@settings(max_examples=15)
@given(data=st.data())
def test_every_instruction_set_does_what_the_reference_does(isa: str, op: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    given_ = data.draw(arguments(op, dtype))
    with on(isa, threads=data.draw(st.integers(1, 3))):
        got = as_one(table.NATIVE[op](*given_))
    wanted = as_one(table.REFERENCE[op](*given_))
    assert got.dtype == wanted.dtype
    assert close(got, wanted, dtype)


@each_isa
@pytest.mark.parametrize("op", ["packed_linear", "paged_attention", "coded_attention"])
@settings(max_examples=15)
@given(data=st.data())
def test_it_is_close_to_arithmetic_in_float64(isa: str, op: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    doubled = tuple(item.double() if isinstance(item, Tensor) and item.is_floating_point() else item for item in given_)
    with on(isa):
        assert close(table.NATIVE[op](*given_), EXACT[op](*doubled), torch.float32)


def test_a_chosen_instruction_set_is_given_back_also_by_a_test_that_fails() -> None:
    before = library().chosen(), library().threads()
    for isa in library().names():
        with pytest.raises(ZeroDivisionError), on(isa, threads=2):
            assert library().chosen() == isa
            assert 1 / 0
        assert (library().chosen(), library().threads()) == before
    with pytest.raises(ValueError, match="no sse1"):
        library().choose("sse1")
    assert library().chosen() == before[0]


# -- written down from the definition, in float64 ------------------------------------------------------------------


@each_isa
def test_a_product_of_4_bit_weights_is_what_its_definition_says(isa: str) -> None:
    """y = sum over i of (code - zero) * scale of the group of i * x, plus the bias."""
    luck = np.random.default_rng(3)
    codes, zero = luck.integers(0, 16, (70, 48)).astype(np.uint8), luck.integers(0, 16, (70, 3)).astype(np.uint8)
    scale, bias, x = (luck.normal(size=size).astype(np.float32) for size in [(70, 3), 70, (5, 48)])
    wanted = np.array(
        [[bias[o] + sum((float(codes[o, i]) - zero[o, i // 16]) * scale[o, i // 16] * float(x[t, i]) for i in range(48)) for o in range(70)]
         for t in range(5)]
    )  # fmt: skip
    made = packing.pack_coded(Integers(*map(torch.from_numpy, (codes, scale, zero))), 4)
    assert made is not None
    with on(isa):
        got = native_linear.packed_linear(torch.from_numpy(x), made[1], made[0], torch.from_numpy(bias), False).numpy()
    assert np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max()


@each_isa
def test_attention_over_pages_is_what_its_definition_says(isa: str) -> None:
    """The token at position 70 + t sees the 66 nearest, its pages lie anywhere; 3 query heads share each of 2 key heads."""
    luck, window, size = np.random.default_rng(4), 66, 5
    q, keys, values = (luck.normal(size=size).astype(np.float32) for size in [(4, 6, 10), (20, size, 2, 10), (20, size, 2, 7)])
    pages = luck.permutation(20)[:15]
    wanted = np.zeros((4, 6, 7))
    for t in range(4):
        for h in range(6):
            places = [(pages[p // size], p % size, h // 3) for p in range(70 + t - window + 1, 70 + t + 1)]
            weights = [math.exp(0.3 * sum(float(a) * float(b) for a, b in zip(q[t, h], keys[place], strict=True))) for place in places]
            wanted[t, h] = sum(w * values[place].astype(float) for w, place in zip(weights, places, strict=True)) / sum(weights)
    where = torch.tensor([[0, 70, 4, 0]]), torch.from_numpy(pages).int()
    with on(isa):
        got = native.paged_attention(*map(torch.from_numpy, (q, keys, values)), *where, 0.3, Window(window=window)).numpy()
    assert np.abs(got - wanted).max() < 1e-6


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_every_number_of_fp8_meets_its_token_exactly(isa: str, dtype: torch.dtype, tokens: int) -> None:
    """Those below 2^-6 among them, and zero of either sign."""
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = torch.stack([numbers.view(torch.uint8).roll(place) for place in range(16)], 1).view(torch.float8_e4m3fn)
    made = packing.pack_fp8(weight, torch.ones(1, 1), (len(weight), 16))
    assert made is not None
    shape, packed = made
    with on(isa):
        got = native_linear.packed_linear(torch.eye(16, dtype=dtype).repeat(3, 1)[:tokens], packed, shape, None, False)
    assert torch.equal(got.float(), weight.float().T.repeat(3, 1)[:tokens])


# -- not a number, and infinite ------------------------------------------------------------------------------------

SPOILT = [math.nan, math.inf, -math.inf]
Coded = Callable[[str], tuple[packing.Shape, Tensor]]


def weight_of(kind: str) -> tuple[packing.Shape, Tensor]:
    luck = torch.Generator().manual_seed(1)
    if kind in ("float32", "bfloat16"):
        made = packing.pack_dense(torch.randn(70, 48, generator=luck).to(getattr(torch, kind)))
    elif kind == "float8":
        made = packing.pack_fp8(torch.randn(70, 48, generator=luck).to(torch.float8_e4m3fn), torch.rand(2, 3, generator=luck), (64, 16))
    else:
        most = 256 if kind.startswith("int8") else 16
        codes = torch.randint(1, most, (70, 48), generator=luck, dtype=torch.uint8)
        zero = torch.full((70, 3), 3 if kind.endswith("zeros") else most // 2, dtype=torch.uint8)
        made = packing.pack_coded(Integers(codes, torch.rand(70, 3, generator=luck), zero), 8 if kind.startswith("int8") else 4)
    assert made is not None
    return made


@each_isa
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("place", [0, 5, 16, 47])
@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        *((kind, False) for kind in ("float32", "bfloat16", "float8")),
        *((kind, way) for kind in ("int8", "int4", "int4 zeros") for way in (False, True, 0.05)),
    ],
)
def test_a_product_hides_nothing_that_is_no_number(isa: str, kind: str, whole: float, place: int, spoilt: float) -> None:
    """`whole`: activations in 8 bits; 0.05: by this scale."""
    shape, packed = weight_of(kind)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    x[1, place] = spoilt
    with on(isa):
        rounding = bool(whole), False, whole if isinstance(whole, float) else 0.0
        got, wanted = (of.packed_linear(x, packed, shape, None, *rounding) for of in (native_linear, reference_packed))
    assert not got[1][~wanted[1].isfinite()].isfinite().any()
    assert got[1][wanted[1].isnan()].isnan().all()
    assert got[[0, 2]].isfinite().all()


@each_isa
@pytest.mark.parametrize("largest", [1e-44, 1e-38, 3e38])
def test_the_smallest_and_the_largest_tokens_round_as_in_the_reference(isa: str, largest: float) -> None:
    shape, packed = weight_of("int8")
    x = torch.linspace(-1, 1, 48)[None] * largest
    with on(isa):
        got = native_linear.packed_linear(x, packed, shape, None, True)
    assert torch.allclose(got, reference_packed.packed_linear(x, packed, shape, None, True), rtol=1e-5, atol=0, equal_nan=True)


def attended(isa: str, change: Callable[[Tensor, Tensor, Tensor], object], kernel: Callable[..., Tensor]) -> Tensor:
    """130 tokens seen by the last two; `change` spoils queries, keys or values."""
    luck = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(size, generator=luck) for size in [(2, 4, 8), (9, 16, 2, 8), (9, 16, 2, 8)])
    change(q, keys, values)
    with on(isa):
        return kernel(q, keys, values, torch.tensor([[0, 128, 2, 0]]), torch.arange(9, dtype=torch.int32), 0.4, Causal())


@each_isa
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("page", [0, 3, 7])
def test_attention_hides_nothing_that_is_no_number(isa: str, what: str, page: int, spoilt: float) -> None:
    def change(q: Tensor, keys: Tensor, values: Tensor) -> None:
        if what == "query":
            q[0, 1, page] = spoilt
        else:
            (keys if what == "key" else values)[page, 2, 1, 3] = spoilt

    got, wanted = (attended(isa, change, kernel) for kernel in (native.paged_attention, reference.paged_attention))
    assert not got[~wanted.isfinite()].isfinite().any()
    assert got[wanted.isnan()].isnan().all()
    assert got[wanted.isfinite()].isfinite().all()


@each_isa
def test_what_is_behind_a_text_or_out_of_its_reach_is_never_read(isa: str) -> None:
    """The place after the last token, pages of others, and, under a window, what lies before it."""
    luck = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(size, generator=luck) for size in [(2, 4, 8), (9, 16, 2, 8), (9, 16, 2, 8)])
    rest = torch.tensor([[0, 100, 2, 0]]), torch.arange(9, dtype=torch.int32), 0.4, Window(window=20, global_tokens=3)
    with on(isa):
        wanted = native.paged_attention(q, keys, values, *rest)
        for pages in (keys, values):
            flat = pages.flatten(0, 1)
            flat[3:81] = math.nan
            flat[102:] = math.nan
        assert torch.equal(native.paged_attention(q, keys, values, *rest), wanted)


@each_isa
def test_silu_reaches_its_ends(isa: str) -> None:
    gate = torch.tensor([-1e38, -1e30, -104, -89, -88.5, -87, 0, 87, 88.5, 1e38, math.inf, -math.inf, math.nan, -0.0, 1, 2, 3])
    with on(isa):
        got = native.silu_mul(gate[None], torch.ones(1, len(gate)))[0]
    assert torch.allclose(got, reference.silu_mul(gate, torch.ones(len(gate))), rtol=1e-5, atol=1e-30, equal_nan=True)


@each_isa
def test_scores_below_minus_1e30_still_weigh(isa: str) -> None:
    def change(q: Tensor, keys: Tensor, values: Tensor) -> None:
        q.zero_()
        q[..., 0], keys[..., 0] = -1e17, 1e17

    assert torch.allclose(*(attended(isa, change, kernel) for kernel in (native.paged_attention, reference.paged_attention)), atol=1e-5)


# -- what is refused -----------------------------------------------------------------------------------------------


def attention_with(**changes: Tensor) -> Tensor:
    usual = {
        "q": torch.ones(2, 4, 8),
        "keys": torch.ones(3, 4, 2, 8),
        "values": torch.ones(3, 4, 2, 8),
        "chunks": torch.tensor([[0, 0, 2, 0]]),
        "tables": torch.tensor([0, 1], dtype=torch.int32),
    }
    return native.paged_attention(*{**usual, **changes}.values(), 1.0, Causal())


WIDE = checks.WIDEST + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 4, 8).half()}, "float32 and bfloat16, not on torch.float16"),
        ({"q": torch.ones(2, 4, 8).bfloat16()}, "queries torch.bfloat16, pages torch.float32"),
        ({"values": torch.ones(3, 4, 2, 8).bfloat16()}, "and torch.bfloat16"),
        ({"tables": torch.tensor([0, 1])}, "tables torch.int64"),
        ({"chunks": torch.tensor([[0, 0, 2, 0]]).int()}, "chunks torch.int32"),
        ({"chunks": torch.tensor([0, 0, 2, 0])}, r"chunks \[4\]"),
        ({"q": torch.ones(2, 3, 8)}, r"queries \[2, 3, 8\]"),
        ({"q": torch.ones(2, 4, 6)}, r"queries \[2, 4, 6\], keys \[3, 4, 2, 8\]"),
        ({"values": torch.ones(3, 5, 2, 8)}, r"values \[3, 5, 2, 8\]"),
        ({"q": torch.ones(2, 4, 7), "keys": torch.ones(3, 4, 2, 7)}, "an even number for keys"),
        ({"q": torch.ones(2, 4, WIDE), "keys": torch.ones(3, 4, 2, WIDE)}, f"heads of {WIDE} and 8 channels: at most {WIDE - 2}"),
        ({"values": torch.ones(3, 4, 2, WIDE)}, f"heads of 8 and {WIDE} channels"),
        ({"keys": torch.ones(6, 4, 2, 8)[::2]}, "pages must follow each other"),
        ({"values": torch.ones(3, 4, 2, 16)[..., ::2]}, "pages must follow each other"),
    ],
)
def test_attention_refuses_what_it_cannot_do(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_with(**changes)


def test_the_widest_heads_are_done() -> None:
    q, keys = torch.ones(2, 4, WIDE - 2), torch.ones(3, 4, 2, WIDE - 2)
    assert torch.equal(attention_with(q=q, keys=keys, values=keys), q)


def product_with(x: Tensor, kind: str = "float32", whole: bool = False, bias: int = 70, size: int = 0, scale: float = 0.0) -> Tensor:
    shape, packed = weight_of(kind)
    return native_linear.packed_linear(x, packed[: len(packed) - size], shape, torch.zeros(bias), whole, input_scale=scale)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_with(torch.ones(2, 48).half()), "float32 and bfloat16, not on torch.float16"),
        (lambda: product_with(torch.ones(2, 48).double(), "int8"), "not on torch.float64"),
        (lambda: product_with(torch.ones(2, 44)), r"x is \[2, 44\] torch.float32, the weight Shape\(kind='float32', inputs=48"),
        (lambda: product_with(torch.ones(48)), r"x is \[48\]"),
        (lambda: product_with(torch.ones(2, 48).bfloat16()), "bfloat16, the weight"),
        (lambda: product_with(torch.ones(2, 48), "bfloat16"), "float32, the weight"),
        (lambda: product_with(torch.ones(2, 48), bias=64), r"the bias is \[64\], the weight has 70 outputs"),
        (lambda: product_with(torch.ones(2, 48), size=256), "takes 24576 bytes"),
        (lambda: product_with(torch.ones(2, 48), whole=True), "activations in 8 bits need a weight of whole numbers"),
        (lambda: product_with(torch.ones(2, 48), "float8", whole=True), "activations in 8 bits need a weight of whole numbers"),
        (lambda: product_with(torch.ones(2, 48), "int8", scale=0.1), "0.1 is no scale for activations as they are"),
        (lambda: product_with(torch.ones(2, 48), "int8", whole=True, scale=-0.1), "-0.1 is no scale for activations in 8 bits"),
        (lambda: product_with(torch.ones(2, 48), "int8", whole=True, scale=math.inf), "inf is no scale"),
        (lambda: native.rms_norm(torch.ones(2, 8).half(), torch.ones(8), 1e-6), "not on torch.float16"),
        (lambda: native.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-6), r"x is \[2, 8\], the weight \[7\]"),
        (lambda: native.rms_norm(torch.ones(2, 8), torch.ones(8).half(), 1e-6), "not on torch.float16"),
        (lambda: native.silu_mul(torch.ones(2, 8), torch.ones(2, 7)), r"\[2, 8\] torch.float32 and \[2, 7\]"),
        (lambda: native.silu_mul(torch.ones(2, 8), torch.ones(2, 8).bfloat16()), "and .* torch.bfloat16"),
        (lambda: native.rope(torch.ones(2, 3, 8), torch.ones(2, 3), torch.ones(2, 4), False), r"cosines are \[2, 3\]"),
        (lambda: native.rope(torch.ones(2, 3, 7), torch.ones(2, 3), torch.ones(2, 3), False), r"x is \[2, 3, 7\]"),
        (lambda: native.rope(torch.ones(2, 3, 8), torch.ones(2, 4).double(), torch.ones(2, 4), False), "must be float32"),
    ],
)
def test_the_other_ops_refuse_what_they_cannot_do(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
