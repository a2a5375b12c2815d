"""The loop against a plain PyTorch loop written out here, step for step."""

from __future__ import annotations

import math
from pathlib import Path

import letter_line
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError, TrainingError
from lineshaft.base.store import Artifact, Store
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.records.tokens import TokenStream
from lineshaft.train import loop
from lineshaft.train.batches import IGNORE, Batch, RowReader, ShuffledRows
from lineshaft.train.loop import LoopConfig
from lineshaft.train.objective import Loss, NextToken
from lineshaft.train.optimiser import OptimiserConfig, build, learning_rate

Line = tuple[Store, dict[str, Artifact]]
OPTIMISER = OptimiserConfig(peak_lr=0.01, clip_norm=0.7, weight_decay=0.3)


def fresh(seed: int = 3) -> Decoder:
    model = Decoder(ModelConfig.model_validate(letter_line.TINY.model_dump() | {"vocab_size": letter_line.VOCABULARY}))
    model.initialise(seed)
    return model


def batches_of(line: Line, rows: int = 2) -> ShuffledRows:
    return ShuffledRows(RowReader(TokenStream(line[1]["tokens"], "train"), 16), rows, seed=4)


def config(**changes: object) -> LoopConfig:
    return LoopConfig.model_validate({"steps": 8, "precision": "float32", "log_every": 1, "optimiser": OPTIMISER, **changes})


def plain_loop(model: Decoder, batches: ShuffledRows, steps: int, accumulate: int, balance: float) -> list[float]:
    """What anybody would write: mean loss over all targets of a step, clip, AdamW by torch, then the routers' biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in name]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
    model.train()
    losses = []
    for step in range(steps):
        parts = [batches[step * accumulate + part] for part in range(accumulate)]
        count = sum(int((part.targets_T != IGNORE).sum()) for part in parts)
        total = 0.0
        for part in parts:
            logits = model(part.tokens_T, part.positions_T, PackedCausal(part.starts_D, len(part.tokens_T), part.row))
            loss = F.cross_entropy(logits, part.targets_T, ignore_index=IGNORE, reduction="sum")
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(OPTIMISER, step, steps)
        optimiser.step()
        optimiser.zero_grad()
        for router in model.routers():
            with torch.no_grad():
                router.e_score_correction_bias += balance * torch.sign(router.load.mean() - router.load)
                router.load.zero_()
        losses.append(total / count)
    return losses


def assert_same(one: Decoder, other: Decoder) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_a_plain_loop_to_the_bit(line: Line, tmp_path: Path, accumulate: int) -> None:
    ours, plain = fresh(), fresh()
    trained = loop.run(ours, batches_of(line), NextToken(), config(accumulate=accumulate, balance_speed=0.02), tmp_path)
    assert [entry["loss"] for entry in trained.history] == plain_loop(plain, batches_of(line), 8, accumulate, 0.02)
    assert_same(ours, plain)
    assert trained.tokens == trained.fresh_tokens == 8 * accumulate * 32
    assert not ours.training


def test_accumulating_batches_equals_one_batch_of_all_their_rows(line: Line, tmp_path: Path) -> None:
    parts, whole = fresh(), fresh()
    in_parts = loop.run(parts, batches_of(line, rows=2), NextToken(), config(accumulate=3), tmp_path / "a")
    at_once = loop.run(whole, batches_of(line, rows=6), NextToken(), config(), tmp_path / "b")
    for one, other in zip(in_parts.history, at_once.history, strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_the_routers_biases_move_towards_equal_load(line: Line, tmp_path: Path) -> None:
    model = fresh()
    (router,) = model.routers()
    seen: list[Tensor] = []

    def counted(of: Decoder, batch: Batch) -> Loss:
        loss = NextToken()(of, batch)
        seen.append(router.load.clone())
        return loss

    loop.run(model, batches_of(line), counted, config(steps=1, balance_speed=0.25), tmp_path)
    assert int(seen[0].sum()) == 32  # one expert a token
    assert torch.equal(router.e_score_correction_bias, 0.25 * torch.sign(seen[0].mean() - seen[0]))
    assert not router.load.any()


def test_the_history_holds_the_mean_since_the_last_entry_and_the_last_step(line: Line, tmp_path: Path) -> None:
    every = loop.run(fresh(), batches_of(line), NextToken(), config(steps=7), tmp_path / "a").history
    some = loop.run(fresh(), batches_of(line), NextToken(), config(steps=7, log_every=3, save_every=6), tmp_path / "b").history
    assert [entry["step"] for entry in some] == [3, 6, 7]
    assert [entry["tokens"] for entry in some] == [96, 192, 224]
    assert some[2] == every[6]
    counts = [int((batches_of(line)[number].targets_T != IGNORE).sum()) for number in range(3)]
    mean = sum(entry["loss"] * count for entry, count in zip(every, counts, strict=False)) / sum(counts)
    assert some[0]["loss"] == pytest.approx(mean, rel=1e-12)
    assert {name: some[0][name] for name in ("lr", "grad_norm")} == {name: every[2][name] for name in ("lr", "grad_norm")}


def test_bfloat16_products_leave_weights_in_float32_and_learn(line: Line, tmp_path: Path) -> None:
    model = fresh()
    history = loop.run(model, batches_of(line), NextToken(), config(precision="bfloat16", steps=20), tmp_path).history
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert history[-1]["loss"] < history[0]["loss"]


def broken_at(step: int, value: float) -> object:
    calls = iter(range(10_000))

    def objective(model: Decoder, batch: Batch) -> Loss:
        loss = NextToken()(model, batch)
        return Loss(loss.total * value, loss.next_token * value) if next(calls) == step else loss

    return objective


def test_a_loss_that_is_no_number_ends_the_run(line: Line, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 4 has a loss of nan .* lower optimiser.peak_lr"):
        loop.run(fresh(), batches_of(line), broken_at(3, math.nan), config(), tmp_path)


def test_a_gradient_that_is_no_number_ends_the_run_though_the_loss_is_one(line: Line, tmp_path: Path) -> None:
    def objective(model: Decoder, batch: Batch) -> Loss:
        parameter, loss = model.model.norm.weight, NextToken()(model, batch)
        nothing = (parameter - parameter.detach()).abs().sum().sqrt()  # zero, with an infinite slope
        return Loss(loss.total + nothing, loss.next_token)

    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1 has a loss of 3.* and a gradient norm of nan"):
        loop.run(model, batches_of(line), objective, config(), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_with_nothing_to_predict_is_told(tmp_path: Path) -> None:
    class OnlyEnds:
        def __getitem__(self, _: int) -> Batch:
            zero = torch.zeros(1, dtype=torch.int64)
            return Batch(zero, zero, zero + IGNORE, zero, row=1)

    with pytest.raises(TrainingError, match="step 1 has nothing to predict"):
        loop.run(fresh(), OnlyEnds(), NextToken(), config(), tmp_path)


def test_the_learning_rate_rises_evenly_then_falls_as_half_a_cosine() -> None:
    shape = OptimiserConfig(peak_lr=2.0, final_lr_share=0.1, warmup_share=0.1)
    rates = [learning_rate(shape, step, 101) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * 0.55)  # half way down
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_the_shortest_runs_have_a_rate_as_well(steps: int, warmup: float) -> None:
    shape = OptimiserConfig(peak_lr=1.0, warmup_share=warmup)
    assert all(0 < learning_rate(shape, step, steps) <= 1 for step in range(steps))


def test_norms_biases_and_the_embedding_table_do_not_decay() -> None:
    model = fresh()
    decayed, plain = build(model, OPTIMISER).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in plain["params"]}
    assert kept == {name for name in names.values() if name.endswith("norm.weight") or "embed_tokens" in name}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_states_between_two_entries_of_the_history_are_refused() -> None:
    with pytest.raises(ConfigError, match="save_every 7 must be a multiple of log_every 5"):
        load(LoopConfig, {"save_every": 7})
