"""A recorded step: it computes what the calls compute, its places are used again, and nothing of PyTorch's is left out."""

from __future__ import annotations

import pytest
import torch
from native_cases import NEEDS_NATIVE
from torch import Tensor

from lineshaft.base.errors import Unrecordable
from lineshaft.ops import table
from lineshaft.ops.recording import Recorded

pytestmark = NEEDS_NATIVE
ROWS, WIDTH = 12, 64


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
