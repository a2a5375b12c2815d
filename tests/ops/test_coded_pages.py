"""Cache pages in 8 bits: the bytes of both encoders, what is lost, what is refused, and attention as over the decoded numbers, in bits."""

from __future__ import annotations

import math

import pytest
import torch
from exact_ops import decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, NEEDS_NATIVE, on, same_bits, worlds
from op_cases import DTYPES, WIDTHS
from torch import Tensor

from lineshaft.ops import coded_pages, native, reference
from lineshaft.ops.checks import WIDEST
from lineshaft.ops.entries import entry_bytes
from lineshaft.ops.reach import Causal

each_isa = pytest.mark.parametrize("isa", ISAS)
SIZES = st.sampled_from(WIDTHS) | st.integers(1, 200)


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """[T, H, width], each group of a size of its own: from what vanishes in float32 to its end, with zeros and ties between."""
    luck = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tokens, heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(SIZES)
    x = torch.randn(tokens, heads, width, generator=luck)
    for group in x.split(64, -1):
        group *= draw(st.sampled_from([0.0, 1e-45, 1e-43, 1e-38, 1e-30, 1.0, 1.0, 1.0, 1e4, 1e37]))
    if draw(st.booleans()):
        x = (x * 8).round() / 2  # halves: ties where the largest is 63.5
        x[..., 0] = 63.5
    return x.to(draw(st.sampled_from(DTYPES)))


def spoil(x: Tensor, draw: st.DrawFn) -> Tensor:
    places = st.integers(0, x.numel() - 1)
    for place in draw(st.lists(places, max_size=4)):
        x.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return x


@NEEDS_NATIVE
@each_isa
@settings(max_examples=60)
@given(data=st.data())
def test_both_encoders_give_the_same_bytes(isa: str, data: st.DataObject) -> None:
    x = spoil(data.draw(vectors()), data.draw)
    tokens, heads, width = x.shape
    slots = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(tokens))[:tokens]
    before = torch.full((2, tokens, heads, entry_bytes(width)), 77, dtype=torch.uint8)
    with on(isa, threads=data.draw(st.integers(1, 3))):
        got = native.write_codes(before.clone(), slots, x)
    assert torch.equal(got, reference.write_codes(before.clone(), slots, x))
    assert (got.flatten(0, 1)[sorted(set(range(2 * tokens)) - set(slots.tolist()))] == 77).all()


@settings(max_examples=60)
@given(x=vectors())
def test_what_comes_back_is_within_half_a_step(x: Tensor) -> None:
    """A step is at most 1/127 of the group's largest, and the bf16 of the scale 1/128 more."""
    back = decoded(coded_pages.encode(x), x.shape[-1])
    for was, now in zip(x.double().split(64, -1), back.split(64, -1), strict=True):
        largest = was.abs().amax(-1, keepdim=True)
        assert ((was - now).abs() <= largest / 127 * (1 + 2**-7) / 2 * (1 + 1e-6) + 2**-134).all()


def test_an_entry_of_64_channels_takes_66_bytes_and_a_scale_is_its_own_groups() -> None:
    assert [entry_bytes(width) for width in (1, 2, 63, 64, 65, 66, 128, 576)] == [4, 4, 66, 66, 70, 70, 132, 594]
    entry = coded_pages.encode(torch.cat([torch.full((64,), 127.0), torch.full((2,), -254.0)]))
    assert entry[:66].view(torch.int8).tolist() == [127] * 64 + [-127] * 2
    assert entry[66:].view(torch.bfloat16).tolist() == [1.0, 2.0]


def test_zeros_are_zeros_and_what_is_no_number_stays_none() -> None:
    assert not coded_pages.encode(torch.zeros(3, 100)).any()
    assert not coded_pages.decode(torch.zeros(3, entry_bytes(100), dtype=torch.uint8), 100, torch.float32).any()  # the page of zeros
    for spoilt in (math.nan, math.inf, -math.inf):
        x = torch.ones(130)
        x[70] = spoilt
        back = coded_pages.decode(coded_pages.encode(x), 130, torch.bfloat16)
        assert back[64:128].isnan().all()
        assert back[:64].isfinite().all()
        assert back[128:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(x=vectors())
def test_decoding_rounds_once(dtype: torch.dtype, x: Tensor) -> None:
    entries = coded_pages.encode(x)
    assert torch.equal(coded_pages.decode(entries, x.shape[-1], dtype), decoded(entries, x.shape[-1]).to(dtype))


# -- attention -----------------------------------------------------------------------------------------------------


@NEEDS_NATIVE
@each_isa
@settings(max_examples=40)
@given(data=st.data())
def test_attention_has_the_bits_of_attention_over_the_decoded_numbers(isa: str, data: st.DataObject) -> None:
    """Windows, blocks, chunks of several requests; also where a scale is no number."""
    dtype, world, width = data.draw(st.sampled_from(DTYPES)), data.draw(worlds()), data.draw(st.sampled_from(WIDTHS))
    luck = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    kv, shared = data.draw(st.sampled_from([(1, 16), (1, 1), (2, 7), (3, 2)]))
    q = torch.randn(world.tokens, kv * shared, width, generator=luck).to(dtype)
    keys, values = (
        coded_pages.encode(spoil(torch.randn(world.pages, world.page_tokens, kv, width, generator=luck), data.draw)) for _ in range(2)
    )
    shown, within = data.draw(st.integers(1, width)), data.draw(st.booleans())  # within: latent attention
    held = keys if within else values
    plain_k, plain_v = (coded_pages.decode(pages, width, dtype) for pages in (keys, held))
    rest = world.chunks, world.tables, 0.4, world.reach
    with on(isa, threads=data.draw(st.integers(1, 3))):
        got = native.coded_attention(q, keys, held, shown, *rest)
        assert same_bits(got, native.paged_attention(q, plain_k, plain_v[..., :shown], *rest))


@NEEDS_NATIVE
@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_entry_of_the_widest_heads(isa: str, dtype: torch.dtype) -> None:
    """Its bytes end where the memory ends, which a sanitizer watches."""
    luck = torch.Generator().manual_seed(3)
    for width in (6, WIDEST - 2, WIDEST):
        q = torch.randn(2, 2, width, generator=luck).to(dtype)
        pages = coded_pages.encode(torch.randn(1, 2, 1, width, generator=luck)).clone()
        rest = torch.tensor([[0, 0, 2, 0]]), torch.tensor([0], dtype=torch.int32), 0.1, Causal()
        plain = coded_pages.decode(pages, width, dtype)
        with on(isa):
            assert same_bits(native.coded_attention(q, pages, pages, width, *rest), native.paged_attention(q, plain, plain, *rest))


# -- what is refused -----------------------------------------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    """Coded entries, the last number their width."""
    return coded_pages.encode(torch.ones(shape))


def attention_with(**changes: object) -> Tensor:
    usual = {
        "q": torch.ones(2, 4, 8),
        "keys": ones(3, 4, 2, 8),
        "held": ones(3, 4, 2, 8),
        "values": 8,
        "chunks": torch.tensor([[0, 0, 2, 0]]),
        "tables": torch.tensor([0, 1], dtype=torch.int32),
    }
    return native.coded_attention(*{**usual, **changes}.values(), 1.0, Causal())


TOO_WIDE = WIDEST + 2


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 4, 8).half()}, "float32 and bfloat16, not on torch.float16"),
        ({"keys": torch.ones(3, 4, 2, 10)}, "pages torch.float32 and torch.uint8"),
        ({"held": torch.ones(3, 4, 2, 10).bfloat16()}, "torch.uint8 and torch.bfloat16"),
        ({"tables": torch.tensor([0, 1])}, "tables torch.int64"),
        ({"chunks": torch.tensor([[0, 0, 2, 0]]).int()}, "chunks torch.int32"),
        ({"q": torch.ones(2, 4, 10)}, "entries of 10 and 10 bytes: for queries of 10 channels both take 12"),
        ({"held": ones(3, 4, 2, 6)}, "entries of 10 and 8 bytes"),
        ({"q": torch.ones(2, 4, 7), "values": 7}, "heads of 7 and 7 channels: at most 1024, and an even number for keys"),
        (
            {"q": torch.ones(2, 4, TOO_WIDE), "keys": ones(3, 4, 2, TOO_WIDE), "held": ones(3, 4, 2, TOO_WIDE)},
            f"heads of {TOO_WIDE} and 8 channels",
        ),
        ({"values": 9}, "values of 9 channels, entries have 8"),
        ({"values": 0}, "values of 0 channels"),
        ({"q": torch.ones(2, 3, 8)}, r"queries \[2, 3, 8\]"),
        ({"held": ones(6, 4, 2, 8)[::2]}, "pages must follow each other"),
    ],
)
def test_attention_refuses_what_it_cannot_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_with(**changes)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("pages", "slots", "entry", "message"),
    [
        (torch.zeros(2, 4, 10), torch.tensor([0]), torch.ones(1, 8), "pages of .* torch.float32"),
        (torch.zeros(2, 4, 9, dtype=torch.uint8), torch.tensor([0]), torch.ones(1, 8), r"slots take \(10,\)"),
        (torch.zeros(2, 4, 10, dtype=torch.uint8), torch.tensor([0]).int(), torch.ones(1, 8), "write_codes"),
        (torch.zeros(2, 4, 10, dtype=torch.uint8), torch.tensor([0, 1]), torch.ones(1, 8), r"1 tokens, \[2\] slots"),
        (torch.zeros(4, 4, 10, dtype=torch.uint8)[::2], torch.tensor([0]), torch.ones(1, 8), "in a row in memory"),
        (torch.zeros(2, 4, 10, dtype=torch.uint8), torch.tensor([0]), torch.ones(1, 8).half(), "not on torch.float16"),
    ],
)
def test_writing_refuses_what_it_cannot_do(pages: Tensor, slots: Tensor, entry: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.write_codes(pages, slots, entry)


def test_the_reference_refuses_entries_of_another_width() -> None:
    with pytest.raises(ValueError, match="entries of 8 channels take 10 bytes"):
        coded_pages.decode(torch.zeros(3, 12, dtype=torch.uint8), 8, torch.float32)
