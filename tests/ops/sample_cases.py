"""Choices of tokens, drawn at random, and what they should be: in float64, one token after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

Floats = npt.NDArray[np.float64]
Rule = tuple[float, int, float, float]
"""Temperature, top-k, top-p, min-p."""
EDGE = 1e-4
"""Float32 and float64 may disagree about a token that lies this near to a border."""

TIED = st.integers(-12, 12).map(lambda n: n / 3)
RULES = st.tuples(
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.integers(0, 25),
    st.sampled_from([1.0, 0.97, 0.83, 0.51, 0.13]),
    st.sampled_from([0.0, 0.01, 0.17, 0.61, 1.0]),
)


def softmax(x: Floats) -> Floats:
    power = np.exp(x - x.max())
    return power / power.sum()


def oracle(values: Sequence[float], rule: Rule) -> tuple[Floats, float]:
    """Probabilities, and how far the nearest decision was from going the other way."""
    temperature, top_k, top_p, min_p = rule
    x = np.array(values, np.float64) / temperature
    nearest = np.inf
    if top_k:
        kth = sorted(x, reverse=True)[: int(top_k)][-1]
        x = np.where(x >= kth, x, -np.inf)
    chances = softmax(x)
    if top_p < 1:
        before = 0.0
        for token in sorted(range(len(x)), key=lambda token: (-chances[token], token)):
            nearest = min(nearest, abs(before - top_p))
            share, chances[token] = chances[token], chances[token] if before < top_p else 0.0
            before += share
    if min_p:
        floor = min_p * chances.max()
        nearest = min([nearest, *(abs(chance - floor) for chance in chances if 0 < chance < chances.max())])
        chances = np.where(chances >= floor, chances, 0.0)
    return chances / chances.sum(), nearest


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits and a table of choices; none lies near a border. Greedy ones among them."""
    luck = np.random.default_rng(draw(st.integers(0, 10**6)))
    width, logits, table = draw(st.sampled_from([1, 7, 16, 33, 300, 777])), [], []
    for _ in range(draw(st.integers(1, 5))):
        values = luck.integers(-12, 13, width) / 3
        rule, place = (0.0, 0, 1.0, 0.0), 0.0
        if draw(st.integers(0, 3)):
            rule = draw(RULES)
            assume(oracle(values, rule)[1] > EDGE)
            place = _clear(values, rule, luck)
        logits.append(values)
        table.append([*rule, place])
    return torch.tensor(np.array(logits), dtype=torch.float32), torch.tensor(table, dtype=torch.float64)


def _clear(values: Floats, rule: Rule, luck: np.random.Generator) -> float:
    """A place among the chances that is not near the end of one."""
    chances, _ = oracle(values, rule)
    token = luck.choice(np.flatnonzero(chances > 2e-5))
    return float(chances[:token].sum() + chances[token] * luck.uniform(0.25, 0.75))


def exact_sample(logits: Tensor, table: Tensor) -> Tensor:
    found = []
    for values, (*rule, luck) in zip(logits.tolist(), table.tolist(), strict=True):
        if rule[0] == 0:
            found.append(values.index(max(values)))
            continue
        ends = np.cumsum(oracle(values, (rule[0], rule[1], rule[2], rule[3]))[0])
        found.append(next(token for token, end in enumerate(ends) if luck < end))
    return torch.tensor(found)
