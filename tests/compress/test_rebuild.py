"""Layers that are rebuilt give nearly what they gave before they were cut; labels are not looked at; copies still leave no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from test_mend import half_of
from test_prune import FEWER, model_of, rows, with_copies
from test_prune_stage import Line, config, dense, learnt, loss  # noqa: F401 # fixtures

from lineshaft.compress import prune_stage
from lineshaft.compress.calibrate.rows import Surroundings, surrounded
from lineshaft.compress.prune import least_worthy, squared_gradients
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.compress.prune_preflight import judge_pruning, prune_memory
from lineshaft.compress.prune_stage import PRUNE
from lineshaft.compress.rebuild import Rebuilding, rebuild
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import twin, without
from lineshaft.train.batches import IGNORE
from lineshaft.train.objective import NextToken
from lineshaft.train.preflight import Training

HOW = Rebuilding(steps=20, lr=5e-3)
TEXTS = rows(8, seed=3)


def around(model: Decoder, **changes: Any) -> list[Surroundings]:
    return [surrounded(replace(text, **changes), model.config) for text in TEXTS]


def apart(model: Decoder, whole: Decoder) -> float:
    """Nats a token between the next token's chances of the two."""
    with torch.inference_mode():
        each = [[one(text.tokens_T, text.positions_T, PackedCausal([0, 8], 20)) for text in TEXTS] for one in (model, whole)]
    ours, theirs = (torch.cat(logits).log_softmax(-1) for logits in each)
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("kind", ["channels", "heads", "experts"])
@FEWER
def test_the_smaller_model_comes_nearer_to_the_whole_one(name: str, kind: str) -> None:
    whole = model_of(name)
    cuts = half_of(twin(whole), kind)
    if not cuts:
        pytest.skip(f"{name} has no {kind} to spare")
    smaller, kept = without(twin(whole), cuts), {at: tensor.clone() for at, tensor in whole.state_dict().items()}
    far = apart(smaller, whole)
    before, after = rebuild(smaller, whole, around(whole), HOW)
    assert after < 0.8 * before
    assert apart(smaller, whole) < 0.8 * far
    assert all(torch.equal(tensor, kept[at]) for at, tensor in whole.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in smaller.parameters())


def test_labels_are_not_looked_at_and_equal_runs_are_equal() -> None:
    whole = model_of("llama")
    cuts = half_of(twin(whole), "channels")
    made = []
    for texts in (around(whole), around(whole), around(whole, targets_T=torch.full_like(TEXTS[0].targets_T, IGNORE))):
        made.append(without(twin(whole), cuts))
        rebuild(made[-1], whole, texts, HOW)
    first, *others = (one.state_dict() for one in made)
    assert all(torch.equal(first[at], other[at]) for other in others for at in first)


@torch.no_grad()
def test_what_is_missed_is_measured_as_a_share() -> None:
    """Of a model that was not cut, nothing; of one whose layers give nothing but what came in, what they add."""
    whole = model_of("llama")
    assert rebuild(twin(whole), whole, around(whole), replace(HOW, steps=0)) == (0.0, 0.0)
    silent, tensors = twin(whole), whole.state_dict()
    silent.load_state_dict({at: torch.zeros_like(tensor) if "proj" in at else tensor for at, tensor in tensors.items()}, assign=True)
    before, after = rebuild(silent, whole, around(whole), replace(HOW, steps=0))
    shares, texts = [], around(whole)
    hidden = ours = [whole.model.embed_tokens(text.batch.tokens_T) for text in texts]
    for layer in whole.model.layers[: whole.config.num_hidden_layers]:
        hidden = [layer(x_TI, text.rotate, text.attend) for x_TI, text in zip(hidden, texts, strict=True)]
        missed = sum(float((x_TI - y_TI).double().square().sum()) for x_TI, y_TI in zip(ours, hidden, strict=True))
        shares.append(missed / sum(float(y_TI.double().square().sum()) for y_TI in hidden))
    assert before == after == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_a_copy_still_goes_without_a_trace() -> None:
    whole, blocks = with_copies("llama", "channels")
    fisher = squared_gradients(twin(whole), TEXTS, NextToken())
    smaller = without(twin(whole), [least_worthy(whole, units, fisher, 1) for units in blocks])
    before, after = rebuild(smaller, whole, around(whole), replace(HOW, lr=3.0))  # a rate that spoils everything
    assert after <= before
    assert max(before, after) < 1e-4


# -- the stage --------------------------------------------------------------------------------------------------------


def test_the_stage_rebuilds_after_the_last_cut_what_was_trained_last(dense: Line, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    store, source, tokens = dense
    seen: list[tuple[Decoder, int]] = []
    monkeypatch.setattr(prune_stage, "rebuild", lambda smaller, whole, texts, how: seen.append((whole, len(texts))) or (0.5, 0.25))
    made = PRUNE(store, config(channels=0.5, recovery_steps=0, rebuild_steps=7, rebuild_rows=5), checkpoint=source, tokens=tokens)
    PRUNE(store, config(channels=0.5, recovery_steps=2, rebuild_steps=7, rebuild_rows=5), checkpoint=source, tokens=tokens)
    (untrained, count), (trained, _) = seen
    plain = load_checkpoint(source.root).state_dict()
    assert count == 3  # batches of two rows
    assert made.manifest.facts["rebuilt"] == [0.5, 0.25]
    assert all(torch.equal(tensor, plain[at]) for at, tensor in untrained.state_dict().items())
    assert plain.keys() == trained.state_dict().keys()
    assert any(tensor.shape != plain[at].shape for at, tensor in trained.state_dict().items())


def test_it_works_through_the_stage(learnt: Line) -> None:  # noqa: F811
    store, source, tokens = learnt
    asked = {"channels": 0.5, "recovery_steps": 0, "calibration_rows": 16, "rows": 4, "rebuild_rows": 100}
    rebuilt = PRUNE(store, config(**asked, rebuild_steps=60), checkpoint=source, tokens=tokens)
    assert loss(rebuilt, tokens) < 1.01 * loss(source, tokens)
    first, last = rebuilt.manifest.facts["rebuilt"]
    assert 0 < last <= first


def test_layers_that_go_are_not_rebuilt() -> None:
    with pytest.raises(ValidationError, match="layers and rebuild_steps"):
        PruneConfig(layers=0.5, rebuild_steps=10)


def test_the_forecast_knows_both_models_and_their_hidden_states() -> None:
    model, asked = model_of("llama").config, PruneConfig(channels=0.5, rebuild_steps=10, rebuild_rows=100_000, sequence_tokens=16)
    given = Training(model, asked.rows, asked.sequence_tokens, 1, "float32")
    terms = prune_memory(given, asked).phases["rebuilding a layer"]
    assert terms["hidden states of 100000 rows, before and after"] == 2 * 4 * 100_000 * 16 * model.hidden_size
    assert "rebuilding a layer" not in prune_memory(given, asked.model_copy(update={"rebuild_steps": 0})).phases
    assert judge_pruning(model, asked, 1 << 30).memory.peak == "rebuilding a layer"
