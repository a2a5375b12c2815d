"""A recorded step: it computes what the calls compute, its places are used again, and nothing of PyTorch's is left out."""

from __future__ import annotations

import pytest
import torch
from native_cases import NEEDS_NATIVE
from torch import Tensor

from lineshaft.base.errors import Unrecordable
from lineshaft.ops import packing, table
from lineshaft.ops.integers import Integers
from lineshaft.ops.packing import Shape
from lineshaft.ops.recording import Recorded

pytestmark = NEEDS_NATIVE
ROWS, WIDTH = 12, 64
Packed = tuple[Shape, Tensor, bool, float]


def chain(x: Tensor) -> Tensor:
    """Fifty calls, of which two results are needed at a time, and the first to the end."""
    first, now = table.add(x, x), x
    for _ in range(50):
        now = table.add(table.silu_mul(now, x), x)
    return table.add(first, now)


@pytest.mark.parametrize("tokens", [1, 5, ROWS])
def test_a_replay_is_the_calls_for_any_number_of_tokens(tokens: int) -> None:
    buffer = torch.zeros(ROWS, WIDTH)
    with torch.inference_mode(), table.steady():
        recorded = Recorded(lambda: chain(buffer))
        for seed in (1, 2):
            buffer[:tokens] = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
            recorded.run(tokens)
            assert torch.equal(recorded.output[:tokens], chain(buffer[:tokens].clone()))
    assert len(recorded) == 102


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (7, 0), (7, 3), (5, ROWS)])
def test_what_finishes_a_step_works_on_rows_of_its_own(tokens: int, rows: int) -> None:
    buffer, chosen = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64)
    with torch.inference_mode(), table.steady():
        recorded = Recorded(lambda: chain(buffer), lambda output: chain(table.embed(chosen, output)))
        buffer[:tokens] = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))
        chosen[:rows] = torch.arange(rows).flip(0) % tokens
        recorded.run(tokens, rows)
        wanted = chain(buffer[:tokens].clone())
        assert torch.equal(recorded.output[:tokens], wanted)
        assert torch.equal(recorded.finished[:rows], chain(wanted[chosen[:rows]]))


def test_places_are_used_again() -> None:
    buffer = torch.zeros(ROWS, WIDTH)
    with torch.inference_mode(), table.steady():
        recorded = Recorded(lambda: chain(buffer))
    assert recorded.arena.size <= 6 * 4 * ROWS * WIDTH


def test_what_pytorch_would_compute_is_refused_by_name_and_recording_ends() -> None:
    x = torch.zeros(ROWS, WIDTH)
    with torch.inference_mode(), table.steady():
        with pytest.raises(Unrecordable, match="mul"):
            Recorded(lambda: table.add(x * 2, x))
        with pytest.raises(Unrecordable, match="copied"):
            Recorded(lambda: table.add(x.transpose(0, 1), x.transpose(0, 1)))
        assert len(Recorded(lambda: table.add(x, x))) == 1


def products(x: Tensor, weights: list[Packed]) -> Tensor:
    """Products of the same activations packed alike and not, of others, and of a buffer that is written into between them."""
    now = x
    for _ in range(3):
        parts = [table.packed_linear(now, packed, shape, None, whole, input_scale=scale) for shape, packed, whole, scale in weights]
        now = table.add(table.add(table.add(parts[0], parts[1]), parts[4]), table.add(table.add(parts[2], parts[3]), now))
        del parts
    return now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, ROWS])
def test_activations_packed_once_serve_the_products_that_would_pack_them_alike(tokens: int, dtype: torch.dtype) -> None:
    luck = torch.Generator().manual_seed(3)
    dense = [packing.pack_dense((torch.randn(WIDTH, WIDTH, generator=luck) / 8).to(dtype)) for _ in range(2)]
    codes = torch.randint(256, (WIDTH, WIDTH), generator=luck, dtype=torch.uint8)
    coded = packing.pack_coded(Integers(codes, torch.full((WIDTH, 2), 1e-3), torch.full((WIDTH, 2), 128, dtype=torch.uint8)), 8)
    weights = [(*dense[0], False, 0.0), (*dense[1], False, 0.0), (*coded, False, 0.0), (*coded, True, 0.0), (*coded, True, 0.1)]
    buffer = torch.zeros(ROWS, WIDTH, dtype=dtype)
    with torch.inference_mode(), table.steady():
        recorded = Recorded(lambda: products(buffer, weights))
        assert len(recorded) == 3 * (2 * 5 - 1 + 5)  # a call to pack and one to multiply, but for the second dense weight; five sums
        for seed in (1, 2):
            buffer[:tokens] = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
            recorded.run(tokens)
            assert torch.equal(recorded.output[:tokens], products(buffer[:tokens].clone(), weights))
