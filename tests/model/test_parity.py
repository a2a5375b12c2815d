"""transformers is the oracle: same checkpoint, same logits, same tokens; and the comparison can fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from toys import TOKENS, TOYS, Theirs, agree, logits_of, prompt

from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model import attend, config, mla, moe, positions, rope
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.norm import RmsNorm
from lineshaft.ops import experts, reach, reference
from lineshaft.sched.request import Ask, Emitted, Sampling

Get = Callable[[str], Theirs]
ANSWER = 40
"""With the 8 tokens before it longer than TOKENS, so than every window here but one."""
CACHED = ["deepseek_v2-yarn", "grid-yarn-qlora-4groups-1dense", "deepseek_v32", "llama-llama3", "mixtral-window", "qwen3_moe"]
"""One of each kind, for which their cached generation is run as well: one token at a time takes them longer than us."""
ALTERNATE = [pytest.param(name, marks=[pytest.mark.slow] if place % 2 and name not in CACHED else []) for place, name in enumerate(TOYS)]
"""For what only has to meet each kind of step, as the engine does: neighbours in the list are alike but for one option."""


@pytest.mark.parametrize("name", TOYS)
def test_logits_are_those_of_transformers(name: str, theirs: Get) -> None:
    ours, tokens = load_checkpoint(theirs(name).folder), prompt(TOKENS)
    assert agree(logits_of(ours, tokens), theirs(name).logits(tokens))


@pytest.mark.parametrize("name", ALTERNATE)
def test_greedy_answers_of_the_engine_are_those_of_transformers(name: str, theirs: Get) -> None:
    start = prompt(8, seed=1)
    answer = answer_of(load_checkpoint(theirs(name).folder), start)
    assert len(answer) == ANSWER
    assert theirs(name).prefers(start, answer)
    if name in CACHED:
        assert theirs(name).greedy(start, ANSWER) == answer


def answer_of(model: Decoder, start: list[int]) -> list[int]:
    """The engine's greedy answer, token by token through the paged cache; pages of 4 so that they are many."""
    engine = Engine(model, EngineConfig(page_tokens=4, max_context=len(start) + ANSWER, cache_bytes=1 << 20))
    engine.submit(Ask(start, Sampling(max_tokens=ANSWER, temperature=0, ignore_eos=True)))
    answer = []
    while not engine.idle:
        answer += [event.token for event in engine.step() if isinstance(event, Emitted)]
    return answer


@pytest.mark.parametrize("name", TOYS)
def test_what_we_save_transformers_loads_without_any_difference(name: str, theirs: Get, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(theirs(name).folder), tmp_path, theirs(name).folder)
    mine, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, theirs(name).folder))
    assert mine.keys() == other.keys()
    assert [which for which in other if not torch.equal(mine[which], other[which])] == []
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    assert again.dtype == torch.float32
    before, after = theirs(name).model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [which for which in before if not torch.equal(before[which], after[which])] == []
    assert torch.equal(again.eval()(torch.tensor([prompt(TOKENS)])).logits[0], theirs(name).logits(prompt(TOKENS)))


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "grid-yarn-qlora-1groups-1dense"])
def test_far_positions_turn_by_the_same_angles(name: str, theirs: Get) -> None:
    """Angles are position times speed: a speed rounded otherwise shows only far from the start."""
    ours, tokens = load_checkpoint(theirs(name).folder), torch.tensor(prompt(6))
    far = torch.arange(100_000, 100_006)
    with torch.inference_mode():
        got = ours(tokens, far, attend.PackedCausal([0], 6))
        expected = theirs(name).model(tokens[None], position_ids=far[None]).logits[0]
    assert agree(got, expected)


@pytest.mark.parametrize("length", [127, 128, 129, 200])
def test_a_growing_base_grows_with_each_text_that_is_longer_than_the_model_was_made_for(length: int, theirs: Get) -> None:
    """Two texts in one row: the short one turns as if it were alone."""
    ours = load_checkpoint(theirs("llama-dynamic").folder)
    long, short = prompt(length), prompt(30, seed=1)
    with torch.inference_mode():
        where = torch.cat([torch.arange(length), torch.arange(30)])
        row = ours(torch.tensor(long + short), where, attend.PackedCausal([0, length], length + 30))
    assert agree(row[:length], theirs("llama-dynamic").logits(long))
    assert agree(row[length:], theirs("llama-dynamic").logits(short))


# The planted bugs. Each takes one thing away, or does it in the way that others did it wrong.


def other_pairs_turned(patch: pytest.MonkeyPatch) -> None:
    right = rope.Rotation.__call__
    patch.setattr(rope.Rotation, "__call__", lambda r, x: right(rope.Rotation(r.cos_TR, r.sin_TR, not r.interleaved), x))


def positions_backwards(patch: pytest.MonkeyPatch) -> None:
    right = Decoder.hidden
    patch.setattr(Decoder, "hidden", lambda self, tokens, where, a: right(self, tokens, where.flip(0), a))


def stretched_not_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rope, "speeds", lambda config, device: 1.0 / config.rope_theta ** rope._steps(config.rotary_dim, device))


def yarn_without_its_ramp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rope, "_yarn_speeds", lambda turns, theta, scaling: 1.0 / (scaling.factor * turns))


def yarn_bounds_as_by_default(patch: pytest.MonkeyPatch) -> None:
    right = rope._yarn_speeds
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    patch.setattr(rope, "_yarn_speeds", lambda turns, theta, scaling: right(turns, theta, scaling.model_copy(update=usual)))


def llama3_without_its_ramp(patch: pytest.MonkeyPatch) -> None:
    def wrong(speed: Tensor, scaling: positions.Llama3) -> Tensor:
        slow = 2 * math.pi / speed > scaling.original_max_position_embeddings / scaling.low_freq_factor
        return torch.where(slow, speed / scaling.factor, speed)

    patch.setattr(rope, "_llama3_speeds", wrong)


def mscale_dropped_from_the_angles(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(positions.Yarn, "length", 1.0)


def mscale_dropped_from_the_scores(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(positions.Yarn, "score_scale", 1.0)


def mscale_on_the_scores_once_instead_of_twice(patch: pytest.MonkeyPatch) -> None:
    right = positions.Yarn.score_scale.fget
    patch.setattr(positions.Yarn, "score_scale", property(lambda self: right(self) ** 0.5))


def norms_inside_attention_like_the_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mla, "LATENT_NORM_EPS", 1e-3)


def indexer_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mla.IndexerBlock, "forward", lambda self, x, narrow, rotate: None)


def indexer_turned_like_the_attention_beside_it(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: mla.IndexerBlock, x: Tensor, rotate: rope.Rotation) -> Tensor:
        turned = rope.Rotation(rotate.cos_TR, rotate.sin_TR, True)(x[..., : self.rope])
        return torch.cat([turned, x[..., self.rope :]], -1)

    patch.setattr(mla.IndexerBlock, "_turned", wrong)


def indexer_one_token_short(patch: pytest.MonkeyPatch) -> None:
    right = mla.IndexerBlock.__init__

    def wrong(self: mla.IndexerBlock, *given: Any) -> None:
        right(self, *given)
        self.top_k -= 1

    patch.setattr(mla.IndexerBlock, "__init__", wrong)


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = config.Architecture.reach_of

    def wrong(self: config.Architecture, layer: int) -> Any:
        seen = right(self, layer)
        return seen if isinstance(seen, reach.Causal) else reach.Window(window=seen.window + 1)

    patch.setattr(config.Architecture, "reach_of", wrong)


def window_in_the_layers_beside(patch: pytest.MonkeyPatch) -> None:
    right = config.Architecture.reach_of
    patch.setattr(config.Architecture, "reach_of", lambda self, layer: right(self, (layer + 1) % self.num_hidden_layers))


def no_window_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config.Architecture, "reach_of", lambda self, layer: reach.Causal())


def groups_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experts, "within_groups", lambda choice, rule: choice)


def groups_judged_like_the_other_versions(patch: pytest.MonkeyPatch) -> None:
    """By their best expert where the best two count, and the other way round."""
    right = experts.within_groups
    patch.setattr(experts, "within_groups", lambda choice, rule: right(choice, replace(rule, sigmoid=not rule.sigmoid)))


def softmax_for_sigmoid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "affinity", lambda logits, rule: logits.softmax(-1))


def sigmoid_for_softmax(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "affinity", lambda logits, rule: logits.sigmoid())


def _weighed(patch: pytest.MonkeyPatch, wrong: Callable[[moe.Router, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Routers that choose as they should, and weigh the chosen (their weights, the input, their numbers) wrongly."""
    right = moe.Router.forward

    def forward(self: moe.Router, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = right(self, x)
        return wrong(self, weights, x, experts), experts

    patch.setattr(moe.Router, "forward", forward)


def weights_not_scaled(patch: pytest.MonkeyPatch) -> None:
    _weighed(patch, lambda self, weights, x, experts: weights / self.rule.scaling)


def weights_made_to_sum_to_one(patch: pytest.MonkeyPatch) -> None:
    _weighed(patch, lambda self, weights, x, experts: weights / weights.sum(-1, keepdim=True))


def bias_in_the_weights(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: moe.Router, weights: Tensor, x: Tensor, experts: Tensor) -> Tensor:
        assert self.e_score_correction_bias is not None
        weights = (F.linear(x, self.weight).sigmoid() + self.e_score_correction_bias).gather(1, experts)
        return weights / weights.sum(-1, keepdim=True) * self.rule.scaling

    _weighed(patch, wrong)


def bias_not_in_the_choice(patch: pytest.MonkeyPatch) -> None:
    right = moe.Router.forward

    def wrong(self: moe.Router, x: Tensor) -> tuple[Tensor, Tensor]:
        self.e_score_correction_bias = torch.zeros(len(self.weight))
        return right(self, x)

    patch.setattr(moe.Router, "forward", wrong)


def shared_expert_without_its_gate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moe.OutputGate, "forward", lambda self, x: torch.full((len(x), 1), 100.0))


def scores_scaled_wrongly(patch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention
    patch.setattr(F, "scaled_dot_product_attention", lambda *a, scale, **options: right(*a, scale=scale * 1.02, **options))


def norms_without_weight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RmsNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], None, self.eps))


def norms_with_another_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RmsNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, 1e-4))


BUGS: dict[Callable[[pytest.MonkeyPatch], None], list[str]] = {
    other_pairs_turned: ["deepseek", "deepseek_v2", "deepseek_v32", "deepseek-half-split", "llama"],
    positions_backwards: ["qwen2"],
    stretched_not_at_all: ["llama-linear", "llama-llama3", "llama-yarn", "grid-yarn-direct-4groups-0dense", "deepseek_v32-yarn"],
    yarn_without_its_ramp: ["llama-yarn", "qwen2-yarn", "qwen3-yarn", "grid-yarn-qlora-1groups-1dense", "deepseek_v2-yarn"],
    yarn_bounds_as_by_default: ["llama-yarn-other-betas", "llama-yarn-untruncated"],
    llama3_without_its_ramp: ["llama-llama3"],
    mscale_dropped_from_the_angles: [
        "llama-yarn",
        "llama-yarn-factor-of-its-own",
        "llama-yarn-two-mscales",
        "deepseek-yarn-no-mscale",
        "deepseek-yarn-one-mscale",
        "deepseek-yarn-two-mscales",
        "deepseek_v2-yarn-two-mscales",
    ],
    mscale_dropped_from_the_scores: [
        *(name for name in TOYS if name.startswith("grid-yarn")),
        "deepseek-yarn-one-mscale",
        "deepseek-half-split-yarn",
        "deepseek_v2-yarn",
        "deepseek_v32-yarn",
    ],
    mscale_on_the_scores_once_instead_of_twice: ["grid-yarn-direct-1groups-0dense", "deepseek_v2-yarn-groups"],
    scores_scaled_wrongly: ["deepseek", "llama"],
    norms_inside_attention_like_the_others: ["deepseek-biased", "deepseek_v2-biased", "deepseek_v32-biased"],
    indexer_ignored: ["deepseek_v32", "deepseek_v32-yarn", "deepseek_v32-groups", "deepseek_v32-sees-one"],
    indexer_turned_like_the_attention_beside_it: ["deepseek_v32"],
    indexer_one_token_short: ["deepseek_v32"],
    window_off_by_one: ["mistral-window", "mistral-window-of-one", "mixtral-window", "qwen3_moe-window", "qwen2-window-in-upper-layers"],
    window_in_the_layers_beside: [
        "qwen2-window-in-upper-layers",
        "qwen2-window-by-layer-types",
        "qwen2_moe-window-in-even-layers",
        "qwen3-window-in-upper-layers",
        "qwen3-window-by-layer-types",
    ],
    no_window_at_all: ["mistral-window", "mixtral-window", "qwen2_moe-window-in-even-layers", "qwen3_moe-window"],
    groups_ignored: ["deepseek-groups", "deepseek-one-group-of-four", "deepseek_v2-groups", "deepseek_v32-groups"],
    groups_judged_like_the_other_versions: ["deepseek-groups", "deepseek_v2-groups"],
    softmax_for_sigmoid: ["deepseek", "deepseek_v32"],
    sigmoid_for_softmax: ["deepseek_v2", "mixtral", "qwen2_moe", "qwen3_moe-weights-as-they-are"],
    weights_not_scaled: ["deepseek", "deepseek_v2"],
    weights_made_to_sum_to_one: ["deepseek-weights-as-they-are", "qwen2_moe-weights-as-they-are", "qwen3_moe-weights-as-they-are"],
    bias_in_the_weights: ["deepseek"],
    bias_not_in_the_choice: ["deepseek", "deepseek_v32"],
    shared_expert_without_its_gate: ["qwen2_moe"],
    norms_without_weight: ["qwen3"],
    norms_with_another_epsilon: ["deepseek-biased"],
}
PLANTED = [pytest.param(plant, name, id=f"{plant.__name__}-{name}") for plant, names in BUGS.items() for name in names]


@pytest.mark.parametrize(("plant", "name"), PLANTED)
def test_a_planted_bug_turns_the_comparison_red(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, theirs: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = theirs(name).logits(prompt(TOKENS))
    monkeypatch.setattr(rope, "_speeds", rope._speeds.__wrapped__)  # what was worked out before the bug is not to be remembered
    plant(monkeypatch)
    assert not agree(logits_of(load_checkpoint(theirs(name).folder), prompt(TOKENS)), expected)
