"""AWQ: the search against a search by hand, planted outliers, and the seeds' way of finding scales, which finds nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.compress import awq
from lineshaft.compress.awq import LEAST_CLIP, Reader, clipped, search
from lineshaft.compress.gptq import Factor, gptq
from lineshaft.model.junction import Port
from lineshaft.ops.formats import Integer

FORMATS = [Integer(bits, group, symmetric) for bits, symmetric in ((8, True), (4, True), (4, False)) for group in (None, 16)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(tokens: int = 300, inputs: int = 64, times: float = 40.0) -> Tensor:
    """Inputs with two channels that are far larger than the others, as language models have them."""
    x_TI = numbers(tokens, inputs, seed=1)
    x_TI[:, [3, 41]] *= times
    return x_TI


def decoded(fmt: Integer, weight_OI: Tensor) -> Tensor:
    return fmt.decode(fmt.encode(weight_OI), torch.float32)


def harm(x_TI: Tensor, made_OI: Tensor, weight_OI: Tensor) -> float:
    """Sum of squares by which outputs change, in float64 by numpy."""
    return float(((x_TI.double().numpy() @ (made_OI - weight_OI).double().numpy().T) ** 2).sum())


def by_scales(x_TI: Tensor, weight_OI: Tensor, fmt: Integer, s_I: Tensor) -> float:
    return harm(x_TI, decoded(fmt, weight_OI * s_I) / s_I, weight_OI)


def centred(s_I: np.ndarray) -> Tensor:
    return torch.from_numpy(s_I / np.sqrt(s_I.max() * s_I.min())).float()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_search_finds_the_best_of_both_kinds(fmt: Integer) -> None:
    x_TI, weight_OI, points = planted(), numbers(48, 64), 10
    mean = x_TI.abs().mean(0).double().numpy()
    grouped = weight_OI.abs().double().numpy().reshape(48, -1, fmt.group or 64)
    weight = (grouped / grouped.max(-1, keepdims=True)).mean(0).ravel()
    candidates = [centred(mean ** (step / points)) for step in range(1, points + 1)]
    candidates += [centred(mean ** (step / points) / weight ** (1 - step / points)) for step in range(points)]
    errors = [by_scales(x_TI, weight_OI, fmt, s_I) for s_I in [torch.ones(64), *candidates]]
    s_C, share = search([Reader(Port("any"), weight_OI, fmt, x_TI, len(x_TI))], x_TI.abs().mean(0), points)
    assert share == pytest.approx(min(errors) / errors[0], rel=1e-4)
    assert by_scales(x_TI, weight_OI, fmt, s_C) == pytest.approx(min(errors), rel=1e-4)


def test_tiles_of_a_weight_and_a_part_of_the_sample_judge_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TI, weight_OI, fmt = planted(4 * 20 + 19), numbers(48, 64), Integer(4, 16)
    mean_C, readers = x_TI.abs().mean(0), [Reader(Port("any"), weight_OI, fmt, x_TI, 1000)]
    whole, codes = search(readers, mean_C), clipped(weight_OI, fmt, x_TI)
    monkeypatch.setattr(awq, "TILE", 7 * 64)  # 48 rows are no multiple of 7
    tiled_C, share = search(readers, mean_C)
    assert torch.equal(tiled_C, whole[0]) and share == pytest.approx(whole[1], rel=1e-5)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in clipped(weight_OI, fmt, x_TI).items())
    monkeypatch.setattr(awq, "SEARCHED", 20)
    s_C, share = search(readers, mean_C)
    few_TI = x_TI[::4]  # 99 tokens are 20 four times, and 19 over
    assert share == pytest.approx(by_scales(few_TI, weight_OI, fmt, s_C) / by_scales(few_TI, weight_OI, fmt, torch.ones(64)), rel=1e-4)


def test_readers_count_by_their_tokens_and_by_the_channels_they_read() -> None:
    x_TI, weight_OI = planted(), numbers(24, 64)
    twice = Port("both", torch.cat([torch.arange(64), torch.arange(64)]))  # each channel is read by two columns
    wide = Reader(twice, torch.cat([weight_OI, weight_OI], 1), Integer(4, 16), torch.cat([x_TI, x_TI], 1), 10)
    plain = Reader(Port("one"), weight_OI, Integer(4, 16), x_TI, 3000)
    mean_C = x_TI.abs().mean(0)
    both, alone = search([plain, wide], mean_C)[0], search([plain], mean_C)[0]
    assert torch.equal(both, alone)  # 300 tokens stand for 3000 on one side and for 10 on the other
    assert both.shape == (64,)


def test_without_outliers_and_inputs_nothing_is_scaled() -> None:
    weight_OI = numbers(8, 16)
    silent = Reader(Port("any"), weight_OI, Integer(4), torch.zeros(5, 16), 5)
    s_C, share = search([silent], torch.zeros(16))
    assert torch.equal(s_C, torch.ones(16)) and share == 1


@pytest.mark.parametrize("group", [None, 16])
def test_awq_and_gptq_beat_rounding_where_channels_are_outliers_and_the_seeds_way_does_not(group: int | None) -> None:
    x_TI, weight_OI, fmt = planted(), numbers(48, 64), Integer(4, group)
    plain = harm(x_TI, decoded(fmt, weight_OI), weight_OI)
    s_C, _ = search([Reader(Port("any"), weight_OI, fmt, x_TI, len(x_TI))], x_TI.abs().mean(0))
    tensors = clipped(weight_OI * s_C, fmt, x_TI / s_C)
    assert harm(x_TI, fmt.decode(tensors, torch.float32) / s_C, weight_OI) < 0.25 * plain
    assert harm(x_TI, fmt.decode(gptq(weight_OI, Factor.of(x_TI.T @ x_TI, order="activation"), fmt), torch.float32), weight_OI) < plain
    # X4: means of attention probabilities are 1 / n whatever the text is, so scales made from them are all alike.
    probabilities_HTT = numbers(4, 32, 32).softmax(-1)
    mean_of_each = float(probabilities_HTT.mean())
    assert mean_of_each == pytest.approx(1 / 32)
    assert by_scales(x_TI, weight_OI, fmt, centred(np.full(64, mean_of_each) ** 0.5)) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999))
def test_each_group_is_clipped_where_it_costs_least(fmt: Integer, seed: int) -> None:
    x_TI, weight_OI, points = numbers(20, 32, seed=seed), numbers(4, 32, seed=seed + 1), 5
    weight_OI[0, 5] *= 8
    made_OI = fmt.decode(clipped(weight_OI, fmt, x_TI, points), torch.float32)
    width = fmt.group or 32
    for row, first in itertools.product(range(4), range(0, 32, width)):
        own = slice(first, first + width)
        errors = []
        for step in range(points + 1):
            kept = weight_OI[row, own] * (1 - step * (1 - LEAST_CLIP) / points)
            scale, zero = fmt.scale_and_zero(kept[None, None])
            codes = fmt.nearest(weight_OI[row, own], scale[0], zero[0])
            found = (codes.float() - zero[0].float()) * scale[0].float()
            errors.append(float((x_TI[:, own] @ (found - weight_OI[row, own])).square().sum()))
        mine = float((x_TI[:, own] @ (made_OI[row, own] - weight_OI[row, own])).square().sum())
        assert mine <= min(errors) * 1.001 + 1e-9
