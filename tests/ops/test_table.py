"""Every kernel in the tables against its reference on random shapes, and every reference against arithmetic in float64."""

from __future__ import annotations

import expert_cases
import pytest
import torch
import torch.nn.functional as F
from exact_ops import EXACT
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import KINDS, mask_of
from native_cases import NEEDS_NATIVE
from op_cases import DTYPES, arguments, close
from torch import Tensor

from lineshaft.ops import reference, reference_indexer, reference_packed, table
from lineshaft.ops.isa import library
from lineshaft.ops.reach import Reach

KERNELS = [
    pytest.param(
        device,
        op,
        marks=[] if device == "cpu" or torch.cuda.is_available() else pytest.mark.skip(reason=f"no {device} here"),
    )
    for device, kernels in table.BY_DEVICE.items()
    for op in kernels
]
KERNELS += [pytest.param("cpu, steady", op) for op in table.STEADY]
KERNELS += [pytest.param("cpu, native", op, marks=NEEDS_NATIVE) for op in table.NATIVE]
EXTRA = {"cpu, steady": table.STEADY, "cpu, native": table.NATIVE}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "op"), KERNELS)
@settings(max_examples=12)
@given(data=st.data())
def test_every_kernel_does_what_its_reference_does(device: str, op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, dtype))
    place = device.partition(",")[0]
    there = tuple(item.to(place, copy=True) if isinstance(item, Tensor) and item.is_contiguous() else item for item in given_)
    before = [item.clone() for item in there if isinstance(item, Tensor)]
    with table.steady(device != place):
        got = expert_cases.as_one(EXTRA[device][op](*there) if device in EXTRA else getattr(table, op)(*there))
    wanted = expert_cases.as_one(table.REFERENCE[op](*given_))
    assert got.dtype == wanted.dtype
    assert close(got.cpu(), wanted, dtype)
    written = 1 if op in ("write_pages", "write_codes") else 0
    after = [item for item in there if isinstance(item, Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before[written:], after[written:], strict=True)), "it wrote into its arguments"


def test_every_op_can_be_called_and_every_device_has_every_op() -> None:
    for device, kernels in table.BY_DEVICE.items():
        assert kernels.keys() == table.REFERENCE.keys()
        assert table.chosen(device).keys() == table.REFERENCE.keys()
    assert table.NATIVE.keys() <= table.REFERENCE.keys()
    own = vars(reference) | vars(reference_packed) | vars(reference_indexer)
    assert all(callable(getattr(table, op)) and kernel is own[op] for op, kernel in table.REFERENCE.items())
    assert set(table.chosen("cpu").values()) == {"reference", "cpu"}
    native = table.NATIVE if library() else {}
    with table.steady():
        assert set(table.chosen("cpu").values()) == {"reference", "steady"} | ({"native"} if native else set())
        assert all(table.kernel(op, torch.empty(1)) is native.get(op, kernel) for op, kernel in table.STEADY.items())
        assert all(table.kernel(op, torch.empty(1)) is kernel for op, kernel in native.items())
    assert set(table.chosen("cpu").values()) == {"reference", "cpu"}


def test_an_unknown_device_runs_the_reference() -> None:
    assert table.kernel("linear", torch.empty(1, device="meta")) is reference.linear


# -- the references, in float64 and in other words ---------------------------------------------------------------


@pytest.mark.parametrize("op", table.REFERENCE)
@settings(max_examples=12)
@given(data=st.data())
def test_every_reference_is_right(op: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    doubled = tuple(item.double() if isinstance(item, Tensor) and item.is_floating_point() else item for item in given_)
    assert close(expert_cases.as_one(table.REFERENCE[op](*given_)), expert_cases.as_one(EXACT[op](*doubled)), torch.float32)


def test_silu_is_torchs() -> None:
    gate = torch.linspace(-20, 20, 101)
    assert torch.equal(reference.silu_mul(gate, torch.ones(101)), F.silu(gate))


ATTENTION = ["reach_gqa", "paged_gqa", "paged_mla", "paged_chosen_mla"]


@pytest.mark.parametrize("tile", [1, 3, 16])
@pytest.mark.parametrize("op", ATTENTION)
@settings(max_examples=12)
@given(data=st.data())
def test_however_the_queries_are_cut_into_tiles_it_is_dense_attention_under_the_mask(op: str, tile: int, data: st.DataObject) -> None:
    given_ = data.draw(arguments(op, torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERIES", tile)
        got = table.REFERENCE[op](*given_)
    assert (got.double() - EXACT[op](*given_)).abs().max() <= 1e-6 * max(1.0, got.abs().max().item())


@pytest.mark.parametrize("op", ["paged_gqa", "paged_mla", "paged_chosen_mla"])
@settings(max_examples=12)
@given(data=st.data())
def test_pages_out_of_reach_are_not_read(op: str, data: st.DataObject) -> None:
    """Entries outside the spans, or chosen by nobody, are not numbers: one that is only masked would spoil the result."""
    given_ = list(data.draw(arguments(op, torch.float32)))
    pages = {"paged_gqa": [1, 2]}.get(op, [2])
    places, tokens = given_[pages[-1] + 1], len(given_[0])
    if op == "paged_chosen_mla":
        used = given_[-2].any(0).nonzero()[:, 0].tolist()
    else:
        first = given_[pages[-1] + 2]
        used = [position for start, stop in given_[-1].spans(first, first + tokens) for position in range(start, stop)]
    before = table.REFERENCE[op](*given_)
    for index in pages:
        kept, size = given_[index], given_[index].shape[1]
        spoilt = torch.full_like(kept, torch.nan)
        for position in used:
            spoilt[places[position // size], position % size] = kept[places[position // size], position % size]
        given_[index] = spoilt
    assert torch.equal(table.REFERENCE[op](*given_), before)


@pytest.mark.parametrize("reach", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_dense_attention(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERIES", 4)
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(19, heads, width, generator=generator).requires_grad_() for heads, width in ((4, 6), (2, 6), (2, 4))]
    weight = torch.randn(19, 4, 4, generator=generator)
    got = torch.autograd.grad((reference.reach_gqa(*leaves, 0.4, reach) * weight).sum(), leaves)
    q, k, v = leaves
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.4
    weights = scores.masked_fill(~torch.from_numpy(mask_of(reach, 19)), -torch.inf).softmax(-1)
    expected = torch.autograd.grad((torch.einsum("hts,shv->thv", weights, v.repeat_interleave(2, 1)) * weight).sum(), leaves)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(got, expected, strict=True))
