"""Products on the tiles of AMX: the order of their arithmetic, sizes that tiles are cut by, and what happens when a trial of them fails.

They run on a processor with AMX, and on any other with AVX-512 and bf16 when the tiles are emulated (native/tests/soft_tiles.sh).
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import NAMES, on, same_bits
from paged_texts import Text, attend
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.ops import isa, native, native_experts, native_linear, packing, reference
from lineshaft.ops.experts import Feeds
from lineshaft.ops.integers import Integers
from lineshaft.ops.reach import Blocks, Causal, Reach, Window

pytestmark = pytest.mark.skipif("amx" not in NAMES, reason="neither AMX nor emulated tiles here")
SMALLEST = 2.0**-126
"""The smallest float32 that is no denormal."""
TOKENS = [1, 2, 6, 7, 16, 17, 31, 33, 48, 256, 257, 300]
"""At and around what one tile, two, and a layout's tile of tokens hold."""


# -- the order of bf16 sums ----------------------------------------------------------------------------------------


def rounded(exact: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """exact + rest, float64 that does not hold the sum, as float32: to nearest even, and 0 where that would be a denormal.

    Rounding twice is safe when the first time is to odd; rest is so small that it only says in which direction to look.
    """
    even = (exact.view(np.int64) & 1) == 0
    odd = np.where((rest != 0) & even, np.nextafter(exact, np.copysign(np.inf, rest)), exact)
    tiny = np.abs(odd) < SMALLEST * (1 - 2.0**-25)  # before it is rounded to the next number of 24 bits
    return np.where(tiny, np.copysign(0.0, odd), odd).astype(np.float32)


def sum_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 of the sum of two float64 (Knuth's two-sum gives what it loses); of float32 numbers, denormals count as zero."""
    exact = a + b
    part = exact - a
    return rounded(exact, (a - (exact - part)) + (b - part))


def no_denormals(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, 0.0, x).astype(np.float64)


def in_the_manuals_order(x_TI: np.ndarray, weight_OI: np.ndarray, rows: int) -> np.ndarray:
    """Even and odd inputs in two chains of FMA from zero over the rows of a tile, their sum, then that added to what there is."""
    x_TI, weight_OI = no_denormals(x_TI), no_denormals(weight_OI)
    sums = np.zeros((len(x_TI), len(weight_OI)), np.float32)
    for start in range(0, x_TI.shape[1], 2 * rows):
        chains = [np.zeros_like(sums), np.zeros_like(sums)]
        for place in range(start, start + 2 * rows):
            product = x_TI[:, None, place] * weight_OI[None, :, place]  # exact in float64
            chains[place % 2] = sum_of(product, chains[place % 2].astype(np.float64))
        sums = sum_of(sums.astype(np.float64), sum_of(*(chain.astype(np.float64) for chain in chains)).astype(np.float64))
    return sums


@pytest.mark.parametrize(("inputs", "rows"), [(4, 2), (20, 10), (64, 16), (68, 2), (480, 16), (1056, 16)])
@pytest.mark.parametrize("denormal", [False, True])
def test_bf16_sums_go_in_the_order_of_intels_manual(inputs: int, rows: int, denormal: bool) -> None:
    """Biases take off all but the last 8 bits of a sum, so that bf16 shows these."""
    luck = np.random.default_rng(inputs)
    sizes = (5, inputs), (70, inputs)
    powers = [luck.integers(-68, -57, size) if denormal else luck.integers(-6, 7, size) for size in sizes]
    x, weight = (torch.from_numpy(luck.normal(size=size) * 2.0**power).bfloat16() for size, power in zip(sizes, powers, strict=True))
    if denormal:
        x[:, 3], weight[:, 3] = 2.0**-130, 2.0**60  # counts as zero, though the product would not
    wanted_TO = torch.from_numpy(in_the_manuals_order(x.float().numpy(), weight.float().numpy(), rows))
    made = packing.pack_dense(weight)
    assert made is not None
    for token, wanted_O in enumerate(wanted_TO):
        top = (wanted_O.view(torch.int32) & ~0xFF).view(torch.float32)
        for bias in (-top, torch.zeros(70)):
            with on("amx"):
                got = native_linear.packed_linear(x[[token]], made[1], made[0], bias, False)[0]
            assert torch.equal(got, (wanted_O + bias).bfloat16())


# -- sizes ---------------------------------------------------------------------------------------------------------


def coded(inputs: int, group: int, bits: int, zeros: bool, outputs: int = 70) -> tuple[packing.Shape, Tensor]:
    luck, most = torch.Generator().manual_seed(inputs), 2**bits
    codes = torch.randint(most, (outputs, inputs), generator=luck, dtype=torch.uint8)
    zero = torch.full((outputs, inputs // group), most // 2, dtype=torch.uint8)
    if zeros:
        zero = torch.randint(most, zero.shape, generator=luck, dtype=torch.uint8)
    made = packing.pack_coded(Integers(codes, torch.rand(outputs, inputs // group, generator=luck), zero), bits)
    assert made is not None
    return made[0], made[1].clone()  # memory of its own: a sanitizer sees what is read behind it


GROUPED = [(8, 8), (40, 40), (64, 32), (96, 96), (104, 104), (512, 128), (576, 576), (1216, 1216)]
CODED = [(bits, *sizes) for bits in (8, 4) for sizes in GROUPED]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "inputs", "group"), CODED)
def test_8_bit_activations_give_the_bits_of_vectors(bits: int, inputs: int, group: int, zeros: bool) -> None:
    shape, packed = coded(inputs, group, bits, zeros)
    x = torch.randn(max(TOKENS), inputs, generator=torch.Generator().manual_seed(1))
    with on("avx512_bf16"):
        wanted = native_linear.packed_linear(x, packed, shape, None, True)
    for tokens in TOKENS:
        with on("amx", 1 + tokens % 3):
            assert same_bits(native_linear.packed_linear(x[:tokens], packed, shape, None, True), wanted[:tokens])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "inputs", "group"), CODED)
def test_codes_that_meet_bf16_give_a_row_the_same_bits_in_any_company(bits: int, inputs: int, group: int, zeros: bool) -> None:
    same_in_any_company(*coded(inputs, group, bits, zeros))


@pytest.mark.parametrize(("inputs", "block"), [(8, 8), (40, 20), (64, 64), (384, 128), (1216, 1216)])
def test_fp8_that_meets_bf16_gives_a_row_the_same_bits_in_any_company(inputs: int, block: int) -> None:
    luck = torch.Generator().manual_seed(inputs)
    weight = torch.randn(130, inputs, generator=luck).to(torch.float8_e4m3fn)
    made = packing.pack_fp8(weight, torch.rand(3, inputs // block, generator=luck), (64, block))
    assert made is not None
    same_in_any_company(*made)


def same_in_any_company(shape: packing.Shape, packed: Tensor) -> None:
    packed = packed.clone()
    x = torch.randn(max(TOKENS), shape.inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    with on("amx"):
        alone = torch.cat([native_linear.packed_linear(x[[row]], packed, shape, None, False) for row in range(len(x))])
    wanted = x.float() @ packing.unpack(packed, shape).T
    assert torch.allclose(alone.float(), wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
    for tokens in TOKENS:
        with on("amx", 1 + tokens % 3):
            assert same_bits(native_linear.packed_linear(x[-tokens:], packed, shape, None, False), alone[-tokens:])


@pytest.mark.parametrize(("kind", "whole"), [("bfloat16", False), ("int8", True), ("int8 of 32", False), ("int4", True), ("float8", False)])
def test_groups_of_outputs_that_share_a_chunk_of_tokens_keep_the_bits(kind: str, whole: bool) -> None:
    """So many inputs that 256 tokens would leave the second cache, and so many outputs that a thread's part has five groups."""
    inputs, outputs = 3328, 1130
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    if kind == "bfloat16":
        made = packing.pack_dense(weight.bfloat16())
    elif kind == "float8":
        made = packing.pack_fp8(weight.to(torch.float8_e4m3fn), torch.rand(9, 26), (128, 128))
    else:
        made = coded(inputs, 32 if kind.endswith("32") else inputs if kind == "int8" else 128, int(kind[3]), True, outputs)
    assert made is not None
    x = torch.randn(500, inputs, generator=torch.Generator().manual_seed(2)).bfloat16()
    with on("amx", 1):
        crowd = native_linear.packed_linear(x, made[1], made[0], None, whole)
        for row in (0, 16, 255, 256, 499):
            assert same_bits(native_linear.packed_linear(x[[row]], made[1], made[0], None, whole), crowd[[row]])


@pytest.mark.parametrize("inputs", [4, 20, 32, 148, 320, 480])
def test_a_bf16_row_has_the_same_bits_in_any_company(inputs: int) -> None:
    luck = torch.Generator().manual_seed(inputs)
    x, weight = (torch.randn(size, inputs + 3, generator=luck).bfloat16()[:, 1:-2] for size in (max(TOKENS), 130))
    made = packing.pack_dense(weight)
    assert made is not None
    shape, packed = made[0], made[1].clone()
    with on("amx"):
        alone = torch.cat([native_linear.packed_linear(x[[row]], packed, shape, None, False) for row in range(len(x))])
    wanted = x.float() @ weight.float().T
    assert torch.allclose(alone.float(), wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
    for tokens in TOKENS:
        with on("amx", 1 + tokens % 3):
            assert same_bits(native_linear.packed_linear(x[-tokens:], packed, shape, None, False), alone[-tokens:])


# -- attention of one query, which reads keys where they lie ---------------------------------------------------------


@pytest.mark.parametrize("reach", [Causal(), Window(window=70), Window(window=30, global_tokens=65)], ids=str)
@pytest.mark.parametrize(
    ("kv", "shared", "width", "values"),
    [
        *((10, 2, 64, 64), (3, 1, 128, 128), (2, 3, 96, 96), (17, 4, 32, 80), (2, 5, 64, 64)),
        *((2, 16, 48, 16), (1, 16, 576, 512), (3, 2, 40, 70), (1, 17, 64, 64)),
    ],
)
def test_a_query_alone_has_the_bits_of_a_chunk(kv: int, shared: int, width: int, values: int, reach: Reach) -> None:
    """Up to four heads, more, and more than a tile; several key heads, more than are taken together; channels that are no whole vector."""
    text, other = (Text.of(first, 4, (kv * shared, kv, width, values), torch.bfloat16, first) for first in (190, 63))
    with on("amx"):
        (chunk,) = attend([(text, 0, 4)], reach, 16, 1)
    for threads, page in ((1, 16), (2, 64), (3, 32), (2, 8)):
        with on("amx", threads):
            alone = [attend([(text, token, token + 1)], reach, page, token)[0] for token in range(4)]
            beside = attend([(other, 3, 4), (text, 3, 4), (other, 0, 2)], reach, page, threads)[1]
        assert same_bits(torch.cat(alone), chunk)
        assert same_bits(beside, chunk[3:])


@pytest.mark.parametrize(("kv", "shared", "width"), [(10, 2, 64), (1, 16, 576), (2, 5, 48), (2, 4, 16)])
def test_a_query_alone_is_near_the_reference(kv: int, shared: int, width: int) -> None:
    luck = torch.Generator().manual_seed(width)
    keys, values = (torch.randn(13, 16, kv, width, generator=luck).bfloat16() for _ in range(2))
    q = torch.randn(1, kv * shared, width, generator=luck).bfloat16()
    rest = torch.tensor([[0, 200, 1, 0]]), torch.arange(13, dtype=torch.int32), width**-0.5, Blocks(block=32, local_blocks=2, stride=3)
    with on("amx", 2):
        got = native.paged_attention(q, keys, values, *rest)
    wanted = reference.paged_attention(q.float(), keys.float(), values.float(), *rest)
    assert torch.allclose(got.float(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 32), (4, 32)])
def test_experts_with_8_bit_activations_give_the_bits_of_vectors(bits: int, group: int) -> None:
    """Of three experts the first has two thirds of the tokens, the last one of them."""
    (wide, gate), (_, up), (down, back) = (coded(64, group, bits, False, outputs) for outputs in (96, 96, 64))
    down, back = coded(96, 96 if group == 64 else 32, bits, True, 64)
    feeds = Feeds((gate, up, gate), (up, gate, gate), (back, back, back), wide, down, True, True)
    luck = torch.Generator().manual_seed(2)
    x, weight = torch.randn(90, 64, generator=luck).bfloat16(), torch.rand(90, 1, generator=luck)
    expert = torch.tensor([0] * 60 + [1] * 29 + [2])[:, None]
    results = []
    for name in ("avx512_bf16", "amx"):
        with on(name, 2):
            results.append(native_experts.experts(x, weight, expert, feeds))
    assert same_bits(*results)


# -- the trial -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fault() -> Generator[Any]:
    """Emulated tiles that give a wrong number in each product."""
    found = isa.library()
    assert found is not None
    if not found.soft_tiles:
        pytest.skip("real tiles can't be told to fail")
    before = found.chosen(), found.threads()
    found.plant_fault(1)
    yield found
    found.plant_fault(0)
    isa._passed_over.clear()
    found.choose(before[0])
    found.set_threads(before[1])


def test_the_trial_finds_nothing_wrong() -> None:
    found = isa.library()
    assert found is not None
    assert {name: found.trial(name) for name in found.names()} == dict.fromkeys(found.names(), "")


def test_tiles_that_give_wrong_numbers_are_passed_over_with_a_warning(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.FORCE, raising=False)
    loaded = isa._load()
    assert loaded is not None
    assert loaded.chosen() == "avx512_bf16"
    said = isa.describe()
    wrong = "wrong products on this processor, so not used: amx (bf16, 256 inputs, 7 tokens)"
    assert said.startswith(f"warning: {wrong}; native kernels: avx512_bf16 of scalar")
    assert "\n" not in said
    assert fault.trial("avx512_bf16") == ""


def test_forced_tiles_that_give_wrong_numbers_are_an_error(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.FORCE, "amx")
    with pytest.raises(ConfigError, match=r"LINESHAFT_ISA=amx: wrong products on this processor \(bf16, 256 inputs, 7 tokens\)"):
        isa._load()
    monkeypatch.setenv(isa.FORCE, "avx512_bf16")
    assert isa._load() is fault
    assert fault.chosen() == "avx512_bf16"


def test_the_trial_sees_a_fault_of_whole_numbers_too(fault: Any) -> None:
    """A wrong product of 8-bit activations, where the bf16 ones are right."""
    fault.plant_fault(2)
    assert fault.trial("amx") == "int8, 512 inputs, 7 tokens"


def test_the_trial_survives_tiles_that_the_processor_refuses(fault: Any) -> None:
    """SIGILL, as from an instruction that the system did not permit; handlers that were there come back."""
    before = signal.getsignal(signal.SIGILL)
    fault.plant_fault(3)
    assert fault.trial("amx") == "it faults"
    fault.plant_fault(0)
    assert fault.trial("amx") == ""
    assert signal.getsignal(signal.SIGILL) == before
