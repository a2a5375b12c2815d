"""transformers is the oracle: same checkpoint, same logits, same tokens; and the comparison can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from toys import TOKENS, TOYS, Theirs, agree, greedy_of, logits_of, prompt

from lineshaft.model import attend, decoder, moe, rope
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.norm import RmsNorm

Get = Callable[[str], Theirs]


@pytest.mark.parametrize("name", TOYS)
def test_logits_are_those_of_transformers(name: str, theirs: Get) -> None:
    ours, tokens = load_checkpoint(theirs(name).folder), prompt(TOKENS)
    assert agree(logits_of(ours, tokens), theirs(name).logits(tokens))


@pytest.mark.parametrize("name", TOYS)
def test_greedy_answers_are_those_of_transformers(name: str, theirs: Get) -> None:
    start = prompt(8, seed=1)
    assert greedy_of(load_checkpoint(theirs(name).folder), start, 32) == theirs(name).greedy(start, 32)


@pytest.mark.parametrize("name", TOYS)
def test_what_we_save_transformers_loads_without_any_difference(name: str, theirs: Get, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(theirs(name).folder), tmp_path, theirs(name).folder)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    assert again.dtype == torch.float32
    before, after = theirs(name).model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [which for which in before if not torch.equal(before[which], after[which])] == []
    assert torch.equal(again(torch.tensor([prompt(9)])).logits[0], theirs(name).logits(prompt(9)))


def test_far_positions_turn_by_the_same_angles(theirs: Get) -> None:
    """Angles are position times speed: a speed rounded otherwise shows only far from the start."""
    ours, tokens = load_checkpoint(theirs("llama").folder), torch.tensor(prompt(6))
    far = torch.arange(100_000, 100_006)
    with torch.inference_mode():
        got = ours(tokens, far, attend.PackedCausal([0], 6))
        expected = theirs("llama").model(tokens[None], position_ids=far[None]).logits[0]
    assert agree(got, expected)


def half_split(patch: pytest.MonkeyPatch) -> None:
    def wrong(config: Any, positions: torch.Tensor) -> rope.Rotation:
        right = rope.rotation(config, positions)
        return rope.Rotation(right.cos_TR, right.sin_TR, not right.interleaved)

    patch.setattr(decoder, "rotation", wrong)


def scores_scaled_wrongly(patch: pytest.MonkeyPatch) -> None:
    right = attend.PackedCausal.gqa
    patch.setattr(attend.PackedCausal, "gqa", lambda *a: right(*a[:-1], attend.Reach(a[-1].scale * 1.02, a[-1].window)))


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = attend.PackedCausal.gqa
    patch.setattr(attend.PackedCausal, "gqa", lambda *a: right(*a[:-1], attend.Reach(a[-1].scale, a[-1].window + 1)))


def positions_backwards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder, "rotation", lambda config, positions: rope.rotation(config, positions.flip(0)))


def groups_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moe.Router, "_within_groups", lambda self, choice: choice)


def softmax_for_sigmoid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "sigmoid", lambda x: x.softmax(-1))


def bias_in_the_weights(patch: pytest.MonkeyPatch) -> None:
    right = moe.Router.forward

    def wrong(self: moe.Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts = right(self, x)[1]
        weights = (F.linear(x, self.weight).sigmoid() + self.e_score_correction_bias).gather(1, experts)
        return weights / weights.sum(-1, keepdim=True) * self.moe.routed_scaling_factor, experts

    patch.setattr(moe.Router, "forward", wrong)


def bias_not_in_the_choice(patch: pytest.MonkeyPatch) -> None:
    right = moe.Router.forward

    def wrong(self: moe.Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.e_score_correction_bias = torch.zeros_like(self.e_score_correction_bias)
        return right(self, x)

    patch.setattr(moe.Router, "forward", wrong)


def weights_not_scaled(patch: pytest.MonkeyPatch) -> None:
    right = moe.Router.forward

    def wrong(self: moe.Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = right(self, x)
        return weights / self.moe.routed_scaling_factor, experts

    patch.setattr(moe.Router, "forward", wrong)


def norms_without_weight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RmsNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], None, self.eps))


def norms_with_another_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RmsNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, 1e-4))


BUGS = [
    (half_split, "deepseek"),
    (half_split, "llama"),
    (positions_backwards, "qwen2"),
    (scores_scaled_wrongly, "deepseek"),
    (scores_scaled_wrongly, "llama"),
    (groups_ignored, "deepseek-groups"),
    (groups_ignored, "deepseek-one-group-of-four"),
    (softmax_for_sigmoid, "deepseek"),
    (bias_in_the_weights, "deepseek"),
    (bias_not_in_the_choice, "deepseek"),
    (weights_not_scaled, "deepseek"),
    (window_off_by_one, "mistral-window"),
    (norms_without_weight, "qwen3"),
    (norms_with_another_epsilon, "deepseek-biased"),
]


@pytest.mark.parametrize(("plant", "name"), BUGS, ids=[f"{plant.__name__}-{name}" for plant, name in BUGS])
def test_a_planted_bug_turns_the_comparison_red(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, theirs: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = theirs(name).logits(prompt(TOKENS))
    plant(monkeypatch)
    assert not agree(logits_of(load_checkpoint(theirs(name).folder), prompt(TOKENS)), expected)
