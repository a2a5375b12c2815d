"""Arguments of the ops of latent attention and mixtures of experts, drawn at random, and the ops themselves in other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import indexer_cases
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.ops.experts import Feeds, Rule
from lineshaft.ops.packing import Shape, pack_dense, unpack

MOST = 40
"""Experts of a router."""


class ExpertShapes:
    """A part of test_table's Shapes."""

    draw: st.DrawFn
    size: Callable[[int], int]
    randn: Callable[..., Tensor]

    def scaled(self) -> tuple[object, ...]:
        tokens = self.size(6)
        return self.randn(tokens, self.size(40)), self.randn(tokens, 1)

    def widen(self) -> tuple[object, ...]:
        return (self.randn(self.size(6), self.size(40)),)

    def join(self) -> tuple[object, ...]:
        lead = [self.size(5) for _ in range(self.draw(st.integers(1, 2)))]
        return self.randn(*lead, self.size(20)), self.randn(*lead, 3, self.size(9))[..., 1, :]

    def packed_by_head(self) -> tuple[object, ...]:
        heads, inputs, outputs = self.size(4), 4 * self.size(5), self.size(70)
        shape, packed = self._packed([self.randn(outputs, inputs) for _ in range(heads)])
        return self.randn(self.size(9), heads, inputs), torch.stack(packed), shape

    def route(self) -> tuple[object, ...]:
        groups, size, sigmoid = self.size(4), 2 + self.size(8), self.draw(st.booleans())
        best = self.draw(st.integers(1, groups))
        rule = Rule(self.draw(st.integers(1, 2 * best)), sigmoid, groups, best, self.draw(st.booleans()), 2.5)
        logits = self.randn(self.size(6), groups * size, dtype=torch.float32)
        return logits, self.randn(groups * size, dtype=torch.float32) if sigmoid else None, rule

    def experts(self) -> tuple[object, ...]:
        count, hidden, width, tokens = self.size(5), 4 * self.size(9), 4 * self.size(20), self.size(9)
        wide, gates = self._packed([self.randn(width, hidden) * hidden**-0.5 for _ in range(count)])
        _, ups = self._packed([self.randn(width, hidden) * hidden**-0.5 for _ in range(count)])
        down, downs = self._packed([self.randn(hidden, width) * width**-0.5 for _ in range(count)])
        weight, expert = self.randn(tokens, count, dtype=torch.float32).softmax(-1).topk(self.draw(st.integers(1, count)))
        return self.randn(tokens, hidden), weight, expert, Feeds(tuple(gates), tuple(ups), tuple(downs), wide, down)

    def _packed(self, weights: list[Tensor]) -> tuple[Shape, list[Tensor]]:
        made = [pack_dense(weight) for weight in weights]
        return made[0][0], [packed for _, packed in made]


def as_one(result: Any) -> Tensor:
    """A router's two results as one that does not hang on the order of the chosen: the weight of every expert. Others side by side."""
    if isinstance(result, Tensor):
        return result
    if result[0].dtype == torch.int32:
        return indexer_cases.as_one(result)
    if len(result) != 2 or result[1].dtype != torch.int64:
        return torch.cat(result, 1)
    weight, expert = result
    return weight.new_zeros(len(weight), MOST).scatter(1, expert, weight)


def exact_packed_by_head(x: Tensor, packed: Tensor, shape: Shape) -> Tensor:
    return torch.stack([x[:, head] @ unpack(packed[head], shape).to(x.dtype).T for head in range(len(packed))], 1)


def exact_route(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Token by token."""
    rows, size = [], logits.shape[1] // rule.groups
    for row in logits:
        near = (1 / (1 + (-row).exp()) if rule.sigmoid else row.exp() / row.exp().sum()).tolist()
        choice = [value + (0.0 if bias is None else bias[place].item()) for place, value in enumerate(near)]
        groups = [range(first, first + size) for first in range(0, len(near), size)]
        groups.sort(key=lambda group: -sum(sorted((choice[place] for place in group), reverse=True)[: 2 if rule.sigmoid else 1]))
        places = sorted((place for group in groups[: rule.best_groups] for place in group), key=lambda place: -choice[place])[: rule.top]
        whole = sum(near[place] for place in places) if rule.normalise else 1.0
        rows.append(([near[place] / whole * rule.scaling for place in places], places))
    return torch.tensor([row[0] for row in rows], dtype=logits.dtype), torch.tensor([row[1] for row in rows])


def exact_experts(x: Tensor, weight: Tensor, expert: Tensor, feeds: Feeds) -> Tensor:
    def feed(row: Tensor, place: int) -> Tensor:
        gate, up = (unpack(of[place], feeds.wide).to(row.dtype) @ row for of in (feeds.gates, feeds.ups))
        return unpack(feeds.downs[place], feeds.down).to(row.dtype) @ (gate / (1 + (-gate).exp()) * up)

    pairs = zip(x, weight, expert.tolist(), strict=True)
    return torch.stack(
        [torch.stack([w * feed(row, place) for w, place in zip(ws, places, strict=True)]).sum(0) for row, ws, places in pairs]
    )


EXACT: dict[str, Callable[..., Any]] = {
    "scaled": lambda x, factor: torch.einsum("ti,t->ti", x, factor[:, 0]),
    "widen": lambda x: x,
    "join": lambda a, b: torch.from_numpy(np.concatenate([a, b], -1)),
    "packed_by_head": exact_packed_by_head,
    "route": exact_route,
    "experts": exact_experts,
}
