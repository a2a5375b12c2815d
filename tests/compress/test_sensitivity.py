"""What rounding one unit does: against rounding it in a copy and asking document by document; estimates against exact sums."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import chain

import letter_line
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filled import filled
from scipy.stats import spearmanr
from shapes import SHAPES
from texts import Documents, batch, divergence, documents, logits_of_each
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.compress.config import coding
from lineshaft.compress.estimates import fisher, gradient
from lineshaft.compress.prune import squared_gradients, worth
from lineshaft.compress.sensitivity import Damage, divergences
from lineshaft.compress.ties import Unit, units
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.units import Units
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import NextToken

FORMATS = ["dense", "int8", "int4", "int4-8", "int8-4-a8"]
SLOW = pytest.param("deepseek-v3", marks=pytest.mark.slow)  # it is deepseek-v3-mtp without what predicts further ahead
FAMILIES = ["llama-biased", "llama-tied", "qwen2-moe", SLOW, "deepseek-v3-added", "deepseek-v3-mtp", "deepseek-v32"]


def texts_for(model: Decoder) -> list[Documents]:
    return [documents(seed, lengths, model.config.vocab_size) for seed, lengths in ((1, [9, 2, 14]), (2, [20, 1, 5]))]


def after_rounding(model: Decoder, layers: Sequence[str], name: str, texts: Documents) -> Tensor:
    """What a copy of these layers gives in their place, which is not told from a copy of the whole model."""
    own = {layer: model.get_submodule(layer) for layer in layers}
    for layer, linear in own.items():
        rounded = copy.deepcopy(linear)
        rounded.recode(coding(name))
        model.set_submodule(layer, rounded)
    logits = logits_of_each(model, texts)
    for layer, linear in own.items():
        model.set_submodule(layer, linear)
    return logits


@pytest.mark.parametrize("shape", FAMILIES)
def test_it_is_what_rounding_a_copy_does_to_each_document_by_itself(shape: str) -> None:
    model = filled(SHAPES[shape], spread=0.15)
    texts = texts_for(model)
    every = list(chain.from_iterable(texts))
    own = units(model, tied="layer")
    experts = [unit for unit in own if unit.name.endswith(".experts")]
    chosen = list(dict.fromkeys([*own[:: max(1, len(own) // 5)], *experts[:1], *own[-2:]]))
    found = divergences(model, [batch(text) for text in texts], chosen, FORMATS)
    before = logits_of_each(model, every)
    for unit in chosen:
        assert "int8" in found[unit.name]
        assert found[unit.name].pop("dense") == 0
        for name, damage in found[unit.name].items():
            expected = divergence(before, after_rounding(model, unit.layers, name, every))
            assert damage == pytest.approx(expected, rel=2e-3, abs=2e-11), (unit.name, name)


def everything_of(model: Decoder) -> list[object]:
    states = [(name, parameter, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]
    return [*states, *(item for item in model.named_buffers()), *((name, part.training) for name, part in model.named_modules())]


def same(one: list[object], other: list[object]) -> bool:
    """The very same objects, where they are tensors."""
    return len(one) == len(other) and all(
        all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("measure", [divergences, fisher, gradient])
def test_the_model_is_left_as_it_was(measure: object, training: bool) -> None:
    model = filled(SHAPES["deepseek-v3-added"]).train(training)
    model.lm_head.weight.requires_grad_(False)
    bits = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    before, modules = everything_of(model), [*model.modules()]
    measure(model, [batch(texts_for(model)[0])], units(model), ["int8"])
    assert same(before, everything_of(model))
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(tensor, bits[name]) for name, tensor in [*model.named_parameters(), *model.named_buffers()])


def test_it_is_put_back_when_a_run_fails() -> None:
    model = filled(SHAPES["llama"])
    before = everything_of(model)
    model.linears()["model.layers.2.self_attn.v_proj"].weight.data[0, 0] = torch.nan  # others already stand in for q and k then
    with pytest.raises(ConfigError, match="not a number"):
        divergences(model, [batch(texts_for(model)[0])], units(model), ["int4-8"])
    assert same(before, everything_of(model))
    assert not torch.is_inference_mode_enabled()


def test_two_runs_give_the_same_numbers() -> None:
    model = filled(SHAPES["qwen2-moe"])
    rows, own = [batch(text) for text in texts_for(model)], units(model)[::3]
    for measure in (divergences, fisher, gradient):
        assert measure(model, rows, own, ["int8", "int4-8"]) == measure(model, rows, own, ["int8", "int4-8"])


# -- estimates --------------------------------------------------------------------------------------------------------


def chances(model: Decoder, one: Batch) -> Tensor:
    logits = model(one.tokens_T, one.positions_T, PackedCausal(one.starts_D, len(one.tokens_T), one.row))
    return F.log_softmax(logits, -1)[one.targets_T != IGNORE]


def test_fisher_is_the_expected_square_of_the_gradient_over_every_token_that_might_come() -> None:
    """Each token and each next token one by one, weighted by its chance; ours draws, so it comes near."""
    config = SHAPES["llama"].model_copy(update={"vocab_size": 7, "num_hidden_layers": 1})
    model = filled(config, spread=0.2)
    one = batch(documents(3, [5, 4], 7))
    names = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    weights = [model.linears()[name].weight for name in names]
    logs = chances(model, one)
    exact = {name: torch.zeros(weight.shape) for name, weight in zip(names, weights, strict=True)}
    for row in logs:
        for log in row:
            for name, slope in zip(names, torch.autograd.grad(log, weights, retain_graph=True), strict=True):
                exact[name] += log.detach().exp() * slope**2
    own = [Unit(name, (name,), (name,)) for name in names]
    found = fisher(model, [one] * 800, own, ["int4-8"])
    for name, weight in zip(names, weights, strict=True):
        fmt = coding("int4-8")
        change = fmt.decode(fmt.encode(weight), torch.float32) - weight.detach()
        expected = float((exact[name] * change**2).sum()) / 2 / len(logs)
        assert found[name]["int4-8"] == pytest.approx(expected, rel=0.12), name


def test_the_gradient_is_that_of_the_mean_loss_and_norms_are_over_a_whole_unit() -> None:
    model = filled(SHAPES["qwen2"])
    texts = texts_for(model)
    (unit,) = [unit for unit in units(model) if unit.name.startswith("model.layers.1.self_attn.q_proj")]
    logs, targets = torch.cat([chances(model, batch(text)) for text in texts]), [text[1:] for text in chain.from_iterable(texts)]
    loss = F.nll_loss(logs, torch.tensor(list(chain.from_iterable(targets))))
    slopes = torch.autograd.grad(loss, [model.linears()[name].weight for name in unit.layers])
    steep = np.linalg.norm(np.concatenate([slope.numpy().ravel() for slope in slopes]).astype(np.float64))
    changes = []
    for name in unit.layers:
        linear = copy.deepcopy(model.linears()[name])
        linear.recode(coding("int4-8"))
        changes.append((linear.dense_weight(torch.float32) - model.linears()[name].weight.detach()).numpy().ravel())
    far = np.linalg.norm(np.concatenate(changes).astype(np.float64))
    found = gradient(model, [batch(text) for text in texts], [unit], ["int4-8"])
    assert found[unit.name]["int4-8"] == pytest.approx(steep * far, rel=1e-4)


# -- what it is for ---------------------------------------------------------------------------------------------------


@cache
def trained() -> tuple[Decoder, list[Batch]]:
    """A llama of four layers that has learnt the text of letters, and calibration rows of that text."""
    config = SHAPES["llama"].model_dump() | {"num_hidden_layers": 4, "vocab_size": letter_line.VOCABULARY, "initializer_range": 0.08}
    model = Decoder(ModelConfig.model_validate(config))
    model.initialise(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(160):
        optimiser.zero_grad()
        one = batch(letter_line.documents(step, 12))
        wanted = one.targets_T[one.targets_T != IGNORE]
        loss = F.nll_loss(chances(model, one), wanted)
        loss.backward()
        optimiser.step()
    assert loss < 1.5, "ln 26 = 3.26 knows nothing, ln 3 = 1.10 all"
    return model.eval(), [batch(letter_line.documents(1000 + row, 12)) for row in range(4)]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, for numbers of which no two are equal."""
    assert len(set(one)) == len(set(other)) == len(one)
    return float(np.corrcoef(*(np.argsort(np.argsort(numbers)) for numbers in (one, other)))[0, 1])


def column(damage: Damage, name: str) -> list[float]:
    return [formats[name] for formats in damage.values()]


def test_estimates_rank_the_layers_of_a_trained_model_as_the_truth_does() -> None:
    model, rows = trained()
    own, formats = units(model, tied="none"), ["int8", "int4", "int4-8"]
    true, squares, slopes = (measure(model, rows, own, formats) for measure in (divergences, fisher, gradient))
    for name in formats:
        assert rank_correlation(column(true, name), column(squares, name)) >= 0.9, name
    assert rank_correlation(*([number for name in formats for number in column(damage, name)] for damage in (true, slopes))) >= 0.8
    ratios = np.array(column(squares, "int4-8")) / np.array(column(true, "int4-8"))
    assert 0.8 < np.median(ratios) < 1.25, "the estimate is in nats, too"


def test_worth_ranks_channels_and_heads_as_taking_one_out_does() -> None:
    """The truth: chances on other text, all of it in one row, with what reads the unit reading zeros."""
    model, rows = trained()
    model, text = copy.deepcopy(model), batch(letter_line.documents(2000, 24))
    found = squared_gradients(model, [*rows, *(batch(letter_line.documents(1100 + row, 12)) for row in range(12))], NextToken())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    before = log_chances(model, text)
    for kind, least in (("channels", 0.9), ("heads", 0.5)):  # of channels there are 160, of heads 8: one pair turned round is 0.02
        blocks = [block for block in model.units() if block.kind == kind]
        true = [divergence(before, without(model, block, unit, text)) for block in blocks for unit in range(block.count)]
        guess = torch.cat([worth(block, weights, found) for block in blocks]).tolist()
        assert spearmanr(true, guess).statistic >= least, kind


@torch.no_grad()
def log_chances(model: Decoder, one: Batch) -> Tensor:
    return chances(model, one).double()


def without(model: Decoder, block: Units, unit: int, text: Batch) -> Tensor:
    (place,) = block.readers
    own = model.state_dict()[place.tensor].movedim(place.axis, 0).unflatten(0, (block.count, -1))[unit]
    kept = own.clone()
    own.zero_()
    answers = log_chances(model, text)
    own.copy_(kept)
    return answers


@pytest.mark.parametrize("fragile", ["model.layers.0.self_attn.v_proj", "model.layers.2.mlp.up_proj", "model.layers.3.self_attn.o_proj"])
def test_a_layer_that_outliers_make_fragile_is_the_most_sensitive(fragile: str) -> None:
    """One weight a channel as large as it takes to leave the others few codes, on an input that is always zero: answers stay."""
    model, rows = trained()
    model = copy.deepcopy(model)
    texts, weight = letter_line.documents(1000, 12), model.linears()[fragile].weight
    with torch.no_grad():
        _silence(model, fragile, 5)
        before = logits_of_each(model, texts)
        weight[:, 5] = weight.abs().amax(1) * 60
        assert torch.equal(before, logits_of_each(model, texts))
    for measure in (divergences, fisher):
        found = column_of_all(measure(model, rows, units(model, tied="none"), ["int8"]))
        assert max(found, key=found.__getitem__) == fragile, measure


def _silence(model: Decoder, layer: str, channel: int) -> None:
    """Nothing comes in at this channel: what writes it writes zeros."""
    (junction,) = [item for item in model.junctions() if any(port.module == layer for port in item.readers)]
    (reader,) = [port for port in junction.readers if port.module == layer]
    own = channel if reader.channel_R is None else int(reader.channel_R[channel])
    for port in junction.writers:
        weight = model.get_submodule(port.module).weight
        rows = [own] if port.channel_R is None else [row for row, at in enumerate(port.channel_R.tolist()) if at == own]
        weight[rows] = 0


def column_of_all(damage: Damage) -> dict[str, float]:
    return {unit: formats["int8"] for unit, formats in damage.items()}


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_told() -> None:
    model = filled(SHAPES["deepseek-v32"])
    rows = [batch(texts_for(model)[0])]
    for measure in (fisher, gradient):
        with pytest.raises(ConfigError, match=r"indexer\.\w+: an indexer chooses, so no gradient reaches it"):
            measure(model, rows, units(model), ["int8"])
        with pytest.raises(ConfigError, match="int8-a8 rounds activations"):
            measure(model, rows, units(model), ["int8", "int8-a8"])
    for measure in (divergences, fisher):
        with pytest.raises(ConfigError, match="predict nothing"):
            measure(model, [batch([[1], [2]])], [units(model)[0]], ["int8"])
    with pytest.raises(ConfigError, match=r"none of int4-64 fits \(int4: 32 inputs are not a multiple of 64"):
        divergences(model, rows, units(model), ["int4-64"])
    model.linears()["lm_head"].recode(coding("int8"))
    with pytest.raises(ConfigError, match=r"lm_head is stored as int8, one scale a channel: sensitivity is measured on the dense model"):
        divergences(model, rows, units(model), ["int8"])
