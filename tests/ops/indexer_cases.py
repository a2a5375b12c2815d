"""Arguments of an indexer's choice whose scores are exact, so that equal ones are many, and the choice in other words."""

from __future__ import annotations

from typing import Any

import native_cases
import numpy as np
import torch
from hypothesis import strategies as st
from masks import mask_of
from torch import Tensor

from lineshaft.ops.reach import Reach

Arguments = tuple[Any, ...]


@st.composite
def choices(draw: st.DrawFn, dtype: torch.dtype) -> Arguments:
    """Small whole numbers, and widths whose root is a power of two: nothing is rounded, in any order."""
    world, luck = draw(native_cases.worlds()), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    heads, width = draw(st.sampled_from([1, 3, 8, 64, 100])), draw(st.sampled_from([4, 16, 64]))

    def numbers(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=luck)

    q, keys = numbers(2, world.tokens, heads, width).to(dtype), numbers(2, world.pages, world.page_tokens, width).to(dtype)
    top, longest = draw(st.integers(1, 12) | st.integers(30, 200)), draw(st.sampled_from([1, 100, 4096]))
    return q, numbers(3, world.tokens, heads).float() / 4, keys, world.chunks, world.tables, top, world.reach, longest


def as_one(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[T, K + 5]: slots, chunks, and how many."""
    slots, chunks, count = found
    return torch.cat([slots.long(), chunks, count.expand(len(slots), 1)], 1)


def exact_choose_keys(
    q: Tensor, weight: Tensor, pages: Tensor, chunks: Tensor, tables: Tensor, top: int, reach: Reach, _longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted by score, then by position, token by token."""
    slots, found = np.full((len(q), top), -1, np.int32), np.zeros((len(q), 4), np.int64)
    keys, size = pages.double().flatten(0, 1).numpy(), pages.shape[1]
    for row, first, count, start in chunks.tolist():
        seen = mask_of(reach, first + count)
        for position in range(first, first + count):
            token = row + position - first
            places = [int(tables[start + at // size]) * size + at % size if seen[position, at] else -1 for at in range(position + 1)]
            near = np.maximum(q[token].double().numpy() @ keys[[max(place, 0) for place in places]].T / keys.shape[1] ** 0.5, 0)
            score = weight[token].double().numpy() @ near
            order = sorted((at for at in range(position + 1) if seen[position, at]), key=lambda at: (-score[at], at))
            mine = [places[at] for at in sorted(order[:top])]
            slots[token, : len(mine)], found[token] = mine, (token, len(mine) - 1, 1, token * top)
    return torch.from_numpy(slots), torch.from_numpy(found), torch.tensor([len(q)])


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """By NumPy's mean and variance."""
    numbers = x.numpy()
    scaled = (numbers - numbers.mean(-1, keepdims=True)) / np.sqrt(numbers.var(-1, keepdims=True) + eps)
    return torch.from_numpy(scaled) * weight + bias


EXACT = {"choose_keys": exact_choose_keys, "layer_norm": exact_layer_norm}
