"""Mending after pruning, against least squares of numpy; copies go without a trace, and what was not looked at is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_prune import FEWER, logits, model_of, rows, with_copies
from test_shrink import same
from torch import Tensor

from lineshaft.compress.calibrate.observe import Wanted, watching
from lineshaft.compress.mend import DAMP, mend, refitted
from lineshaft.compress.prune import evenly, least_worthy
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import Cut, each, with_stand_ins, without
from lineshaft.train.batches import Batch
from lineshaft.train.objective import NextToken

TEXTS = rows(20, seed=3)


def half_of(model: Decoder, kind: str) -> list[Cut]:
    """Every block loses half of these units, where that many can go."""
    chosen = [units for units in model.units() if units.kind == kind and units.count >= 2 * each(model.config, units)]
    return [least_worthy(model, units, evenly(model), units.count // 2) for units in chosen]


def inputs_of(model: Decoder, names: list[str], texts: list[Batch]) -> dict[str, np.ndarray]:
    """All tokens that come into these layers, [T, I]."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        model.linears()[name].register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0].detach()))
        for name in names
    ]
    with torch.no_grad():
        for text in texts:
            NextToken()(model, text)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).double().numpy() for name, found in seen.items()}


@pytest.mark.parametrize("kind", ["channels", "heads"])
@FEWER
def test_the_readers_are_those_of_least_squares(name: str, kind: str) -> None:
    model, twin = model_of(name), model_of(name)
    cuts = half_of(model, kind)
    if not cuts:
        pytest.skip(f"{name} has no {kind} to spare")
    before = {at: tensor.clone() for at, tensor in model.state_dict().items()}
    mend(model, cuts, TEXTS, NextToken())
    seen = inputs_of(twin, [place.tensor.removesuffix(".weight") for cut in cuts for place in cut.units.readers], TEXTS)
    looked_at = 0
    for cut in cuts:
        (place,) = cut.units.readers
        wide = before[place.tensor].shape[1] // cut.units.count
        kept = [unit * wide + offset for unit in cut.kept for offset in range(wide)]
        gone = sorted(set(range(before[place.tensor].shape[1])) - set(kept))
        found = model.state_dict()[place.tensor]
        assert not found[:, gone].any()
        if place.tensor.removesuffix(".weight") not in seen:
            continue
        looked_at += 1
        x_TI, w_OI = seen[place.tensor.removesuffix(".weight")], before[place.tensor].double().numpy()
        start = with_stand_ins(before[place.tensor], place, cut)[:, kept].double().numpy()
        damp = np.sqrt(DAMP * (x_TI[:, kept] ** 2).sum(0).mean())
        left = np.concatenate([x_TI[:, kept], damp * np.eye(len(kept))])
        right = np.concatenate([x_TI @ w_OI.T, damp * start.T])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
        assert np.allclose(found[:, kept].numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()), place.tensor
        plain, mended = (np.square(x_TI @ w_OI.T - x_TI[:, kept] @ w.T).sum() for w in (start, found[:, kept].double().numpy()))
        assert mended < plain
    assert looked_at > 1
    untouched = set(before) - {place.tensor for cut in cuts for place in cut.units.readers}
    assert all(torch.equal(before[at], model.state_dict()[at]) for at in untouched)


@pytest.mark.parametrize("kind", ["channels", "heads"])
@FEWER
def test_copies_still_go_without_a_trace(name: str, kind: str) -> None:
    model, chosen = with_copies(name, kind)
    before, cuts = logits(model), [least_worthy(model, units, evenly(model), each(model.config, units)) for units in chosen]
    mend(model, cuts, TEXTS, NextToken())
    assert same(before, logits(without(model, cuts)), 1e-4)


def test_the_source_is_not_written_to_and_no_inputs_change_nothing() -> None:
    model = model_of("llama-biased")
    shared = dict(model.state_dict())
    kept = {at: tensor.clone() for at, tensor in shared.items()}
    cuts = half_of(model, "channels")
    mend(model, cuts, [], NextToken())
    assert all(torch.equal(kept[at], tensor) for at, tensor in model.state_dict().items())
    mend(model, cuts, TEXTS[:4], NextToken())
    assert all(torch.equal(kept[at], tensor) for at, tensor in shared.items())
    assert not torch.equal(kept["model.layers.0.mlp.down_proj.weight"], model.state_dict()["model.layers.0.mlp.down_proj.weight"])


def test_units_that_give_nothing_leave_the_start() -> None:
    weight, start = torch.randn(3, 4), torch.randn(3, 2)
    assert refitted(weight, start, torch.zeros(4, 4), torch.tensor([0, 2])) is start


def test_an_expert_that_no_token_came_to_keeps_its_stand_ins() -> None:
    model, few = model_of("qwen3-moe"), rows(1, tokens=9)
    cuts = [least_worthy(model, units, evenly(model), units.count // 2) for units in model.units() if units.kind == "channels"]
    readers = {cut.units.readers[0].tensor: cut for cut in cuts}
    with watching({at: model.linears()[at.removesuffix(".weight")] for at in readers}, Wanted()) as seen, torch.no_grad():
        NextToken()(model, few[0])
    idle = set(readers) - set(seen)
    assert idle  # or this test shows nothing: take a shorter text
    before = {at: model.state_dict()[at].clone() for at in idle}
    mend(model, cuts, few, NextToken())
    left = without(model, cuts).state_dict()
    for at in idle:
        cut = readers[at]
        assert torch.equal(model.state_dict()[at], before[at])
        assert torch.equal(left[at], with_stand_ins(before[at], cut.units.readers[0], cut)[:, cut.kept])
