"""A row's numbers are the same bits alone and in any company, on every instruction set and any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import reaches
from native_cases import ISAS, NEEDS_NATIVE, on, same_bits, weights
from paged_texts import Piece, Text, attend
from torch import Tensor

from lineshaft.ops import native, native_linear
from lineshaft.ops.reach import Causal, Window

pytestmark = NEEDS_NATIVE
each_isa = pytest.mark.parametrize("isa", ISAS)
THREADS = st.integers(1, 3)
PRODUCTS = [
    ("dense", torch.float32, False),
    ("dense", torch.bfloat16, False),
    ("float8", torch.float32, False),
    ("float8", torch.bfloat16, False),
    *((kind, dtype, whole) for kind in ("int8", "int4") for dtype in (torch.float32, torch.bfloat16) for whole in (False, True)),
]


@each_isa
@pytest.mark.parametrize(("kind", "dtype", "whole"), PRODUCTS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_row_of_a_product(isa: str, kind: str, dtype: torch.dtype, whole: bool, data: st.DataObject) -> None:
    shape, packed = data.draw(weights(kind, dtype))
    luck = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    x = torch.randn(data.draw(st.integers(1, 20)), shape.inputs, generator=luck).to(dtype)
    bias = torch.randn(shape.outputs, generator=luck) if data.draw(st.booleans()) else None
    scale = data.draw(st.sampled_from([0.0, 0.02])) if whole else 0.0

    def product(rows: list[int]) -> Tensor:
        with on(isa, data.draw(THREADS)):
            return native_linear.packed_linear(x[rows], packed, shape, bias, whole, input_scale=scale)

    alone = torch.cat([product([row]) for row in range(len(x))])
    for _ in range(3):
        company = data.draw(st.lists(st.integers(0, len(x) - 1), min_size=1, max_size=20))
        assert same_bits(product(company), alone[company])


@each_isa
@pytest.mark.parametrize("op", ["rms_norm", "rope", "silu_mul"])
@settings(max_examples=10)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), width=st.integers(1, 50), rows=st.integers(2, 12), threads=THREADS)
def test_a_row_of_what_is_done_to_each(isa: str, op: str, dtype: torch.dtype, width: int, rows: int, threads: int) -> None:
    x, y = torch.randn(2, rows, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    angles = y[:, :width].float()

    def run(part: slice, used: int) -> Tensor:
        with on(isa, used):
            if op == "rms_norm":
                return native.rms_norm(x[part], y[0], 1e-6)
            if op == "rope":
                return native.rope(x[part, None], angles[part].cos(), angles[part].sin(), bool(width % 2))
            return native.silu_mul(x[part], y[part])

    whole = run(slice(None), threads)
    assert all(same_bits(run(slice(row, row + 1), 1), whole[row : row + 1]) for row in range(rows))


@each_isa
@settings(max_examples=20)  # for each instruction set, of 5 runs and one for each token
@given(data=st.data())
def test_a_chunk_of_attention(isa: str, data: st.DataObject) -> None:
    """Alone, cut in two, beside other requests, in pages of another size."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kv, shared, width = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 5, 33])), 2 * data.draw(st.integers(1, 20))
    sizes = kv * shared, kv, width, data.draw(st.sampled_from([width, 7, 70]))
    lengths = st.tuples(st.sampled_from([0, 1, 40, 63, 64, 100, 130]), st.integers(2, 20))
    text, *others = (Text.of(*data.draw(lengths), sizes, dtype, seed) for seed in range(3))
    far = st.sampled_from([Causal(), Window(window=70), Window(window=30, global_tokens=65)])  # sums long enough to have an order
    reach = data.draw(data.draw(st.sampled_from([far, far, far, reaches()])))
    pages, tokens = st.sampled_from([1, 3, 16, 64, 100]), len(text.q)
    middle = data.draw(st.integers(1, tokens - 1))

    def run(*pieces: Piece) -> list[Tensor]:
        with on(isa, data.draw(THREADS)):
            return attend(list(pieces), reach, data.draw(pages), data.draw(st.integers(0, 99)))

    (alone,) = run((text, 0, tokens))
    assert alone.isfinite().all()
    company = [(other, 0, len(other.q)) for other in others]
    assert same_bits(run(company[0], (text, 0, tokens), company[1])[1], alone)
    assert same_bits(torch.cat(run((text, 0, middle), (text, middle, tokens))), alone)
    assert same_bits(torch.cat([*run((text, 0, middle)), run(company[0], (text, middle, tokens))[1]]), alone)
    assert same_bits(torch.cat([run((text, token, token + 1))[0] for token in range(tokens)]), alone)
