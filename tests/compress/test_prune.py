"""What a unit is worth, against a plain loop; dead units and copies are the ones that go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from filled import filled
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES
from test_shrink import same
from torch import Tensor

from lineshaft.compress import prune
from lineshaft.compress.prune import evenly, least_worthy, squared_gradients
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.model.junction import scale
from lineshaft.model.moe import ExpertBlock
from lineshaft.model.shrink import each, without
from lineshaft.model.units import Place, Units
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import NextToken

MIXED = pytest.param("qwen3-moe", marks=pytest.mark.slow)
"""Slow: each of its blocks is in another family, dense layers beside experts in DeepSeek's."""
FAMILIES = pytest.mark.parametrize("name", ["llama-biased", MIXED, "deepseek-v3-mtp", "deepseek-v32", "qwen2-moe"])
FEWER = pytest.mark.parametrize(
    "name", ["llama-biased", MIXED, pytest.param("deepseek-v3-mtp", marks=pytest.mark.slow), "deepseek-v32", "qwen2-moe"]
)
"""For what comes after the choice of units: DeepSeek's two have the same readers, and a prediction layer each."""


def rows(count: int, seed: int = 0, tokens: int = 20) -> list[Batch]:
    """Random texts, each of two documents."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 61, (tokens + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[7] = IGNORE
        found.append(Batch(ids[:-1], torch.cat([torch.arange(8), torch.arange(tokens - 8)]), targets, torch.tensor([0, 8]), tokens))
    return found


def logits(model: Decoder) -> dict[str, Tensor]:
    (row,) = rows(1, seed=9)
    with torch.inference_mode():
        return {"logits": model(row.tokens_T, row.positions_T, PackedCausal([0, 8], 20))}


def model_of(name: str) -> Decoder:
    """Random in everything but the balancing biases, so that every expert gets tokens."""
    model = filled(SHAPES[name])
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()
    return model


def detached(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def worth_of(model: Decoder, units: Units, fisher: dict[str, Tensor]) -> Tensor:
    return prune.worth(units, detached(model), fisher)


def by_name(model: Decoder) -> dict[str, Units]:
    return {units.name: units for units in model.units()}


# -- worth ------------------------------------------------------------------------------------------------------------


def weights_of(units: Units, unit: int, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """A unit's own numbers in each tensor, by slices."""
    found = []
    for place in (*units.own, *units.readers):
        if place.tensor in tensors:
            width = tensors[place.tensor].shape[place.axis] // units.count
            span = slice(unit * width, (unit + 1) * width)
            found.append(tensors[place.tensor][span] if place.axis == 0 else tensors[place.tensor][:, span])
    inside = f"{units.members}.{unit}."
    return found + [tensor for name, tensor in tensors.items() if units.members and name.startswith(inside)]


@FAMILIES
def test_worth_is_that_of_a_plain_loop_over_rows_in_float64(name: str) -> None:
    model, texts = model_of(name), rows(3)
    weights = {at: parameter.detach().double().numpy() for at, parameter in model.named_parameters()}
    wanted = {units.name: np.zeros(units.count) for units in model.units()}
    twin = model_of(name)
    for row in texts:
        twin.zero_grad()
        (NextToken()(twin, row).total / 19).backward()
        slopes = {at: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for at, p in twin.named_parameters()}
        for units in model.units():
            for unit in range(units.count):
                pairs = zip(weights_of(units, unit, slopes), weights_of(units, unit, weights), strict=True)
                wanted[units.name][unit] += sum(float(((g * w) ** 2).sum()) for g, w in pairs) / len(texts)
    fisher = squared_gradients(model, texts, NextToken())
    for units in model.units():
        found = worth_of(model, units, fisher)
        assert np.allclose(found.numpy(), wanted[units.name], rtol=1e-4), units.name
        worst = least_worthy(model, replace(units, alike=False, groups=1), fisher, max(1, units.count // 4))
        assert list(worst.gone) == np.argsort(found.numpy(), kind="stable")[: len(worst.gone)].tolist()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama-biased", "deepseek-v3", "qwen2-moe"])
def test_worth_does_not_depend_on_how_large_channels_happen_to_be(name: str) -> None:
    """Scaled along its junctions a model computes the same, and gradients shrink as weights grow. Magnitudes do not know that."""
    model, texts = model_of(name), rows(2)
    fisher = squared_gradients(model, texts, NextToken())
    before = {units.name: worth_of(model, units, fisher) for units in model.units()}
    even = evenly(model)
    plain = {units.name: worth_of(model, units, even) for units in model.units()}
    generator = torch.Generator().manual_seed(1)
    for junction in model.junctions():
        if junction.name.endswith((".intermediate", ".values")):
            scale(model, junction, 2.0 ** torch.randint(-2, 3, (junction.channels,), generator=generator))
    fisher, even = squared_gradients(model, texts, NextToken()), evenly(model)
    for units in model.units():
        assert torch.allclose(worth_of(model, units, fisher), before[units.name], rtol=1e-3), units.name
        assert not torch.allclose(worth_of(model, units, even), plain[units.name], rtol=0.01), units.name


def test_magnitude_is_the_squared_length_of_all_its_weights() -> None:
    model = filled(SHAPES["qwen2-moe"])
    weights = {at: parameter.detach().double().numpy() for at, parameter in model.named_parameters()}
    for units in model.units():
        found = worth_of(model, units, evenly(model))
        wanted = [sum(float((w**2).sum()) for w in weights_of(units, unit, weights)) for unit in range(units.count)]
        assert np.allclose(found.numpy(), wanted, rtol=1e-5)


# -- dead units -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def kill(model: Decoder, units: Units, dead: list[int]) -> None:
    """What reads these units is zero; an expert gives zero; a layer adds zero."""
    for unit in dead:
        for place in units.readers:
            torch.unflatten(model.state_dict()[place.tensor], place.axis, (units.count, -1)).select(place.axis, unit).zero_()
        if units.members:
            for at, parameter in model.get_submodule(f"{units.members}.{unit}").named_parameters():
                if "down_proj" in at or "o_proj" in at:
                    parameter.zero_()


def dead_in(units: Units, seed: int, count: int) -> list[int]:
    size = units.count // units.groups
    luck = np.random.default_rng([seed, len(units.name)])
    return sorted(int(place) + group * size for group in range(units.groups) for place in luck.choice(size, count // units.groups, False))


@FAMILIES
@pytest.mark.parametrize("kind", ["channels", "heads", "experts", "layers"])
def test_dead_units_are_the_ones_that_go_and_nothing_changes(name: str, kind: str) -> None:
    model = model_of(name)
    chosen = [units for units in model.units() if units.kind == kind]
    dead = {units.name: dead_in(units, 3, each(model.config, units) * units.groups) for units in chosen}
    dead = {at: found for at, found in dead.items() if len(found) < by_name(model)[at].count - 1}
    if not dead or (kind == "experts" and chosen[0].groups > 1):
        pytest.skip("there are none, or too few")
    for at, found in dead.items():
        kill(model, by_name(model)[at], found)
    fisher = squared_gradients(model, rows(8), NextToken())
    cuts = [least_worthy(model, units, fisher, len(dead[units.name])) for units in chosen]
    assert {cut.units.name: sorted(cut.gone) for cut in cuts} == dead
    if kind != "experts":  # a dead expert that goes sends its tokens to others
        assert same(logits(model), logits(without(model, cuts)))


# -- copies -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def copy(model: Decoder, units: Units, pairs: list[tuple[int, int]], noise: float = 0.0) -> None:
    """The second of each pair works as the first does; channels and heads are read otherwise."""
    state, generator = model.state_dict(), torch.Generator().manual_seed(5)
    for first, second in pairs:
        tensors = [torch.unflatten(state[place.tensor], place.axis, (units.count, -1)) for place in units.own]
        found = [(tensor[first], tensor[second]) for tensor in tensors]  # what units work with are rows
        if units.members:
            twins = (dict(model.get_submodule(f"{units.members}.{unit}").named_parameters()) for unit in (first, second))
            found += list(zip(*(twin.values() for twin in twins), strict=True))
        for source, target in found:
            target.copy_(source + noise * source.abs().mean() * torch.empty_like(source).normal_(generator=generator))


def pairs_in(units: Units, seed: int, count: int) -> list[tuple[int, int]]:
    places = np.random.default_rng([seed, len(units.name)]).permutation(units.count)[: 2 * count]
    return [(int(first), int(second)) for first, second in places.reshape(-1, 2)]


@pytest.mark.parametrize("worth", ["taylor", "magnitude"])
@pytest.mark.parametrize("kind", ["channels", "heads", "experts"])
@FAMILIES
def test_of_two_that_do_the_same_one_goes_and_the_other_stands_in(name: str, kind: str, worth: str) -> None:
    model = model_of(name)
    chosen = [units for units in model.units() if units.kind == kind]
    pairs = {units.name: pairs_in(units, 4, max(1, units.count // 8)) for units in chosen if units.count > 2}
    if not pairs or (kind == "experts" and chosen[0].groups > 1):
        pytest.skip("there are none, or too few")
    for at, found in pairs.items():
        copy(model, by_name(model)[at], found, 0.02)
    fisher = squared_gradients(model, rows(8), NextToken()) if worth == "taylor" else evenly(model)
    for units in chosen:
        if units.name not in pairs:
            continue
        cut = least_worthy(model, units, fisher, len(pairs[units.name]))
        assert {frozenset(pair) for pair in cut.gone.items()} == {frozenset(pair) for pair in pairs[units.name]}, units.name


def with_copies(name: str, kind: str) -> tuple[Decoder, list[Units]]:
    """A model and its blocks of this kind, in each of which some units are copies of others. Skips where there are too few."""
    model = model_of(name)
    chosen = [units for units in model.units() if units.kind == kind and units.count > 2 * each(model.config, units)]
    if len(chosen) < len([units for units in model.units() if units.kind == kind]):
        pytest.skip("too few")
    for units in chosen:
        copy(model, units, pairs_in(units, 4, each(model.config, units)))
    return model, chosen


@pytest.mark.parametrize("kind", ["channels", "heads"])
@FAMILIES
def test_copies_that_are_cut_change_nothing(name: str, kind: str) -> None:
    model, chosen = with_copies(name, kind)
    before, fisher = logits(model), squared_gradients(model, rows(8), NextToken())
    cuts = [least_worthy(model, units, fisher, each(model.config, units)) for units in chosen]
    assert all(other is not None for cut in cuts for other in cut.gone.values())
    assert same(before, logits(without(model, cuts)))


def test_three_copies_leave_one_that_is_read_by_all() -> None:
    model = filled(SHAPES["llama"])
    units = by_name(model)["model.layers.1.mlp.intermediate"]
    copy(model, units, [(5, 6), (5, 30)])
    fisher = squared_gradients(model, rows(8), NextToken())
    cut = least_worthy(model, units, fisher, 2)
    assert {*cut.gone, *cut.gone.values()} == {5, 6, 30}
    others = [least_worthy(model, other, fisher, 2) for other in model.units() if other.kind == "channels" and other != units]
    kept = model.state_dict()["model.layers.1.mlp.down_proj.weight"][:, [5, 6, 30]].sum(1)
    left = without(model, [cut, *others]).state_dict()["model.layers.1.mlp.down_proj.weight"]
    place = cut.kept.index(next(unit for unit in (5, 6, 30) if unit not in cut.gone))
    assert torch.allclose(left[:, place], kept, atol=1e-5)


def test_experts_nobody_chooses_go_first() -> None:
    model = model_of("deepseek-v3-wide-values")
    for block in (module for module in model.modules() if isinstance(module, ExpertBlock)):
        assert block.gate.e_score_correction_bias is not None
        block.gate.e_score_correction_bias[[2, 5]] = -100.0
    fisher = squared_gradients(model, rows(4), NextToken())
    before = logits(model)
    cuts = [least_worthy(model, units, fisher, 2) for units in model.units() if units.kind == "experts"]
    assert [list(cut.gone) for cut in cuts] == [[2, 5], [2, 5]]
    assert same(before, logits(without(model, cuts)))


# -- the choice -------------------------------------------------------------------------------------------------------


def chosen_anew(worth: np.ndarray, fisher: np.ndarray, own: np.ndarray, groups: int, count: int) -> dict[int, int | None]:
    """As the module's docstring says it, everything worked out again for each unit, in float64."""
    alive, gone, worth, size = set(range(len(worth))), {}, worth.copy(), len(worth) // groups
    for _ in range(count):
        best: tuple[float, int, int | None] = (np.inf, -1, None)
        for unit in sorted(alive):
            if sum(other // size == unit // size for other in gone) == count // groups:
                continue
            spare, stand_in = 1.0, None
            for other in sorted(alive - {unit}):
                share = (fisher[unit] * (own[unit] - own[other]) ** 2).sum() / (fisher[unit] * own[unit] ** 2).sum()
                if share < spare:
                    spare, stand_in = share, other
            best = min(best, (worth[unit] * spare, unit, stand_in), key=lambda found: found[:2])
        _, unit, stand_in = best
        gone[unit] = stand_in
        alive.remove(unit)
        if stand_in is not None:
            worth[stand_in] += worth[unit]
    return gone


@settings(max_examples=60)
@given(data=st.data(), groups=st.sampled_from([1, 1, 2, 3]), size=st.integers(2, 6), near=st.integers(0, 5))
def test_the_choice_is_that_of_a_loop_that_forgets_nothing(data: st.DataObject, groups: int, size: int, near: int) -> None:
    count = groups * data.draw(st.integers(1, size - 1))
    luck = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    own, fisher, worth = luck.normal(size=(groups * size, 5)), luck.uniform(0.1, 1, (groups * size, 5)), luck.uniform(0.1, 1, groups * size)
    for _ in range(near):
        first, second = luck.integers(0, groups * size, 2)
        own[second] = own[first] + 0.3 * luck.normal(size=5)
    siblings = prune._Siblings(torch.tensor(fisher), torch.tensor(own))
    found = prune._chosen(torch.tensor(worth), siblings, groups, count)
    assert list(found.items()) == list(chosen_anew(worth, fisher, own, groups, count).items())


def test_units_are_held_against_each_other_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(SHAPES["llama"])
    units, fisher = by_name(model)["model.layers.0.mlp.intermediate"], squared_gradients(model, rows(2), NextToken())
    whole = least_worthy(model, units, fisher, 12)
    monkeypatch.setattr(prune, "ROWS_AT_ONCE", 7)
    assert least_worthy(model, units, fisher, 12).gone == whole.gone


def test_a_balancing_bias_is_no_weight() -> None:
    model = filled(SHAPES["deepseek-v3"])
    units = by_name(model)["model.layers.1.mlp.experts"]
    assert Place("model.layers.1.mlp.gate.e_score_correction_bias", 0) in units.own
    before = worth_of(model, units, evenly(model))
    model.model.layers[1].mlp.gate.e_score_correction_bias += 100
    assert torch.equal(before, worth_of(model, units, evenly(model)))
