"""Processor kernels: bf16 widened where that pays, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import arguments, close

from lineshaft.ops import cpu, reference, table


@pytest.fixture
def always_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WIDE_ROWS", 1)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("op", table.CPU)
@settings(max_examples=25)
@given(data=st.data())
def test_widened_kernels_do_what_their_references_do(op: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.bfloat16))
    with torch.inference_mode():
        got = table.CPU[op](*given_)
    assert got.dtype == torch.bfloat16
    assert close(got, table.REFERENCE[op](*given_), torch.bfloat16)


@pytest.mark.usefixtures("always_widened")
def test_a_widened_product_is_rounded_once() -> None:
    x, weight, bias = torch.randn(5, 300).bfloat16(), torch.randn(7, 300).bfloat16(), torch.randn(7).bfloat16()
    with torch.inference_mode():
        assert torch.equal(cpu.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()).bfloat16())


@pytest.mark.parametrize(
    ("rows", "tiles", "dtype", "widened"),
    [
        (cpu.WIDE_ROWS, False, torch.bfloat16, True),
        (cpu.WIDE_ROWS - 1, False, torch.bfloat16, False),
        (cpu.WIDE_ROWS, True, torch.bfloat16, False),
        (cpu.WIDE_ROWS, False, torch.float32, False),
    ],
)
def test_it_is_widened_only_where_that_pays(
    rows: int, tiles: bool, dtype: torch.dtype, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(reference, "linear", lambda x, weight, bias: seen.append(x.dtype) or F.linear(x, weight, bias))
    x, weight = torch.randn(rows, 4).to(dtype), torch.randn(3, 4).to(dtype)
    with torch.inference_mode():
        cpu.linear(x, weight, None)
    assert seen == ([] if widened else [dtype])
    cpu.linear(x, weight.requires_grad_(), None)
    assert seen[-1:] == [dtype]  # with gradients never
