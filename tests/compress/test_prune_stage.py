"""The pruning stage in miniature: cut, recover, resume, refuse."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letter_line
import pytest
import torch
import transformers
from rich.console import Console
from toys import agree, logits_of

from lineshaft.base import terminal
from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress import prune_stage
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.compress.prune_stage import PRUNE
from lineshaft.evaluate.quality import HeldOut, score_model
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import Architecture, GroupedQueryAttention, MixtureOfExperts
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer
from lineshaft.records.tokens import TokenStream
from lineshaft.train import state
from lineshaft.train.batches import RowReader
from lineshaft.train.stage import HISTORY_FILE, PRETRAIN

SCRIPT = Path(__file__).with_name("killed_pruning.py")
QWEN = Architecture(
    family="qwen3_moe",
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=32,
    max_position_embeddings=64,
    attention=GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm=True),
    moe=MixtureOfExperts(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, scoring_func="softmax", n_shared_experts=0),
    initializer_range=0.1,
)
Line = tuple[Store, Artifact, Artifact]


def config(**changes: Any) -> PruneConfig:
    same = {"multiple": 4, "step_share": 0.2, "calibration_rows": 2, "sequence_tokens": 16, "rows": 2}
    same |= {"recovery_steps": 3, "last_recovery_steps": changes.get("recovery_steps", 3), "rebuild_steps": 0}
    return PruneConfig(**same | {"lr": 3e-3, "precision": "float32"} | (changes or {"channels": 0.5}))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A store with a small DeepSeek and its tokens."""
    store, parents = letter_line.parents(tmp_path_factory.mktemp("prune"))
    return store, PRETRAIN(store, letter_line.config(), **parents), parents["tokens"]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A store with a mixture that has learnt its text."""
    store = Store(tmp_path_factory.mktemp("learnt"))
    letters = letter_line.tokenizer(store)
    tokens = letter_line.tokens(store, letters, letter_line.documents(1, 1500), letter_line.documents(2, 40))
    asked = letter_line.config(model=QWEN, steps=140, rows=8, save_every=140, optimiser={"peak_lr": 1e-2})
    return store, PRETRAIN(store, asked, tokens=tokens, tokenizer=letters), tokens


def by_hand(store: Store, source: Artifact, change: Callable[[Decoder], object]) -> Artifact:
    """A checkpoint with a model that was changed."""
    model = load_checkpoint(source.root)
    change(model)
    with store.draft("checkpoint", stage="by_hand", version=len(list(store.all())), config={}) as draft:
        assert isinstance(draft, Draft)
        save_checkpoint(model, draft.root, source.root)
        made = draft.root.parent.name
    return store.open(made)


def loss(checkpoint: Artifact, tokens: Artifact) -> float:
    text = HeldOut(RowReader(TokenStream(tokens, "heldout"), 16), [1] * letter_line.VOCABULARY, 10**6)
    return score_model(load_checkpoint(checkpoint.root), text).loss


# -- what comes of it -------------------------------------------------------------------------------------------------


def test_the_result_is_a_smaller_ordinary_model(dense: Line) -> None:
    store, source, tokens = dense
    digest = store.open(source.id).manifest.digest
    made = PRUNE(store, config(channels=0.5, heads=0.5, experts=0.5), checkpoint=source, tokens=tokens)
    assert store.open(source.id).manifest.digest == digest  # its mapped weights were not written to
    model = load_checkpoint(made.root)
    facts = made.manifest.facts
    assert facts["cut"] == {
        "intermediate_size": [32, 16],
        "moe_intermediate_size": [16, 8],
        "n_routed_experts": [4, 2],
        "num_attention_heads": [2, 1],
    }
    counted = sum(tensor.numel() for tensor in model.state_dict().values())
    assert facts["parameters"] == counted == cost_of(model.config).parameters < facts["parameters_before"]
    text = TokenStream(tokens, "heldout").read(0, 40).tolist()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.root).eval()
    with torch.inference_mode():
        assert agree(logits_of(model, text), theirs(torch.tensor([text])).logits[0])
    assert made.path("tokenizer.json").read_bytes() == source.path("tokenizer.json").read_bytes()


def test_layers_can_go_with_all_that_is_cut_of_them(dense: Line) -> None:
    store, source, tokens = dense
    made = PRUNE(store, config(channels=0.5, experts=0.5, layers=0.5), checkpoint=source, tokens=tokens)
    model = load_checkpoint(made.root)
    assert (len(model.model.layers), made.manifest.facts["cut"]["num_hidden_layers"]) == (1, [2, 1])
    assert made.manifest.facts["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())


def test_each_cut_is_followed_by_as_many_steps_on_text_that_goes_on(dense: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, source, tokens = dense
    seen: list[int] = []
    plain = prune_stage._Later.__getitem__
    monkeypatch.setattr(prune_stage._Later, "__getitem__", lambda self, number: (seen.append(self.first + number), plain(self, number))[1])
    made = PRUNE(store, config(channels=0.5, seed=3), checkpoint=source, tokens=tokens)
    history = [json.loads(entry) for entry in made.path(HISTORY_FILE).read_text().splitlines()]
    assert seen == list(range(9))
    assert [(entry["step"], entry["cuts"], entry["tokens"]) for entry in history] == [(3, 1, 96), (6, 2, 192), (9, 3, 288)]
    assert made.manifest.facts["tokens"] == 288


def test_learning_rates_are_on_one_curve_over_all_recoveries_and_rise_anew_after_each_cut() -> None:
    asked = config(channels=0.5, recovery_steps=20, last_recovery_steps=None, lr=1e-2, final_lr_share=0.1)
    counts = asked.recoveries(3)
    assert counts == [20, 20, 60]
    assert config(channels=0.5, recovery_steps=20, last_recovery_steps=7).recoveries(3) == [20, 20, 7]
    assert config(channels=0.5, recovery_steps=0, last_recovery_steps=None).recoveries(3) == [0, 0, 0]
    optimiser = asked.training(100).loop.optimiser
    rates = [prune_stage.Recovery(cut, counts).rate(optimiser, step) for cut, count in enumerate(counts) for step in range(count)]
    curve = [1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 99)) / 2) for step in range(100)]
    warm = {0: 1 / 2, 20: 1 / 2} | {40 + step: (step + 1) / 6 for step in range(5)}
    assert rates == pytest.approx([rate * warm.get(step, 1) for step, rate in enumerate(curve)])
    assert config(channels=0.5, final_lr_share=1.0).training(5).loop.optimiser.final_lr_share == 1.0


def test_recoveries_are_trained_at_those_rates(dense: Line) -> None:
    store, source, tokens = dense
    made = PRUNE(store, config(channels=0.5, seed=5, lr=2e-3), checkpoint=source, tokens=tokens)
    history = [json.loads(entry) for entry in made.path(HISTORY_FILE).read_text().splitlines()]
    wanted = [2e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * step / 8)) / 2) for step in (2, 5, 8)]
    assert [entry["lr"] for entry in history] == pytest.approx(wanted)


def test_calibration_rows_differ_from_step_to_step(dense: Line) -> None:
    _, _, tokens = dense
    text = prune_stage.Text(RowReader(TokenStream(tokens, "train"), 16), config(channels=0.5, calibration_rows=3))
    first, second = text.calibration(0), text.calibration(1)
    assert len(first) == len(second) == 3
    assert not any(torch.equal(one.tokens_T, other.tokens_T) for one in first for other in second)


def test_recovery_can_be_left_out(dense: Line) -> None:
    store, source, tokens = dense
    made = PRUNE(store, config(channels=0.5, recovery_steps=0), checkpoint=source, tokens=tokens)
    assert not made.path(HISTORY_FILE).exists()
    assert "final_loss" not in made.manifest.facts
    before, after = load_checkpoint(source.root).state_dict(), load_checkpoint(made.root).state_dict()
    kept = {tuple(row) for row in before["model.layers.0.mlp.up_proj.weight"].tolist()}
    assert all(tuple(row) in kept for row in after["model.layers.0.mlp.up_proj.weight"].tolist())
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("worth", ["taylor", "magnitude"])
def test_equal_requests_give_equal_bytes(worth: str, dense: Line, tmp_path: Path) -> None:
    store, source, tokens = dense
    asked = config(channels=0.5, heads=0.5, worth=worth)
    first = PRUNE(store, asked, checkpoint=source, tokens=tokens)
    again, parents = letter_line.parents(tmp_path / "again")
    torch.manual_seed(7)
    source2 = PRETRAIN(again, letter_line.config(), **parents)
    assert PRUNE(again, asked, checkpoint=source2, tokens=parents["tokens"]).manifest.digest == first.manifest.digest


def test_worth_is_measured_as_asked(dense: Line) -> None:
    store, source, tokens = dense
    asked = (config(channels=0.5, recovery_steps=0, worth=worth) for worth in ("taylor", "magnitude"))
    taylor, magnitude = (load_checkpoint(PRUNE(store, each, checkpoint=source, tokens=tokens).root) for each in asked)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(taylor.state_dict()[name], magnitude.state_dict()[name])


# -- redundancy -------------------------------------------------------------------------------------------------------


def copy_experts(model: Decoder) -> None:
    """Of the eight experts of each layer two become copies of others."""
    for layer in model.model.layers:
        for first, second in ((1, 6), (4, 3)):
            layer.mlp.gate.weight[second] = layer.mlp.gate.weight[first]
            layer.mlp.experts[second].load_state_dict(layer.mlp.experts[first].state_dict())


@pytest.mark.parametrize("recovery_steps", [0, 20])
def test_a_quarter_of_the_experts_that_is_redundant_costs_less_than_a_percent(learnt: Line, recovery_steps: int) -> None:
    store, source, tokens = learnt
    with torch.no_grad():
        redundant = by_hand(store, source, copy_experts)
    asked = config(experts=0.25, step_share=0.25, calibration_rows=16, recovery_steps=recovery_steps, rows=8)
    made = PRUNE(store, asked, checkpoint=redundant, tokens=tokens)
    assert made.manifest.facts["cut"] == {"n_routed_experts": [8, 6]}
    assert loss(source, tokens) < 1.5, "it has learnt something"
    assert loss(made, tokens) <= 1.01 * loss(redundant, tokens)
    if not recovery_steps:
        left = {tuple(row) for row in load_checkpoint(made.root).state_dict()["model.layers.0.mlp.gate.weight"].tolist()}
        assert left == {tuple(row) for row in load_checkpoint(redundant.root).state_dict()["model.layers.0.mlp.gate.weight"].tolist()}


def test_dead_channels_go_for_nothing(learnt: Line) -> None:
    store, source, tokens = learnt

    def kill(model: Decoder) -> None:
        for name, linear in model.linears().items():
            if name.endswith("down_proj"):
                linear.weight[:, ::2] = 0

    with torch.no_grad():
        half_dead = by_hand(store, source, kill)
    asked = config(channels=0.5, calibration_rows=32, recovery_steps=0)
    made = PRUNE(store, asked, checkpoint=half_dead, tokens=tokens)
    text = TokenStream(tokens, "heldout").read(0, 40).tolist()
    one, other = (logits_of(load_checkpoint(item.root), text) for item in (half_dead, made))
    assert agree(one, other)


def test_recovery_recovers(learnt: Line) -> None:
    store, source, tokens = learnt
    found = [loss(source, tokens)]
    for steps in (0, 30):
        asked = config(heads=0.5, calibration_rows=16, recovery_steps=steps, rows=8)
        found.append(loss(PRUNE(store, asked, checkpoint=source, tokens=tokens), tokens))
    dense, bare, recovered = found
    assert recovered - dense < 0.3 * (bare - dense)


# -- resumed ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    cuts, digest = told["undisturbed"]
    assert cuts == 3
    assert {rerun[3] for rerun in told["reruns"]} == {digest}
    keep, steps = ([rerun[2] for rerun in told["reruns"] if rerun[0] == where] for where in ("keep", "loss"))
    assert set(keep) == {2, 1}  # from the model before, until the rename; from this one, after it
    assert len(keep) > 5
    # Two rows for worth, two for mending and three steps of recovery each; every second of them was killed.
    assert steps == [3, 3, 3, 3, 2, 2, 2, 1, 1, 1, 1]


class Stopped(Exception):
    """What a test throws into a run."""


def test_a_damaged_model_costs_time_and_changes_nothing(
    dense: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = PRUNE(dense[0], config(channels=0.5, seed=9), checkpoint=dense[1], tokens=dense[2]).manifest.digest
    store, parents = letter_line.parents(tmp_path / "stopped")
    source = PRETRAIN(store, letter_line.config(), **parents)
    plain = state.write

    def stopping(folder: Path, step: int, *given: Any) -> None:
        plain(folder, step, *given)
        if step == 2 and folder.name == "cuts":
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(state, "write", stopping)
        PRUNE(store, config(channels=0.5, seed=9), checkpoint=source, tokens=parents["tokens"])
    (scratch,) = (store.root / "work").glob("*/scratch")
    assert sorted(path.name for path in (scratch / "cuts").iterdir()) == ["step-00000001", "step-00000002"]
    file = scratch / "cuts" / "step-00000002" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    told = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=told))
    assert PRUNE(store, config(channels=0.5, seed=9), checkpoint=source, tokens=parents["tokens"]).manifest.digest == wanted
    assert "resume: step-00000002 is damaged, going back to the one before" in told.getvalue()
    assert not list((store.root / "work").iterdir())


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_compressed_checkpoint_is_not_pruned(dense: Line) -> None:
    store, source, tokens = dense
    small = by_hand(store, source, lambda model: model.model.layers[0].mlp.gate_proj.recode(Integer(8)))
    with pytest.raises(ConfigError, match=r"prune: .* is compressed .* prune the dense checkpoint and compress the result"):
        PRUNE(store, config(), checkpoint=small, tokens=tokens)


def test_tokens_of_another_tokenizer_are_refused(dense: Line) -> None:
    store, source, _ = dense
    other = letter_line.tokens(store, letter_line.tokenizer(store, version=2), letter_line.documents(1, 9), letter_line.documents(2, 9))
    with pytest.raises(ConfigError, match=r"prune: .* was made with another tokenizer"):
        PRUNE(store, config(), checkpoint=source, tokens=other)


def test_rows_longer_than_the_context_are_refused(dense: Line) -> None:
    store, source, tokens = dense
    with pytest.raises(ConfigError, match="prune: sequence_tokens 128 exceeds"):
        PRUNE(store, config(channels=0.5, sequence_tokens=128), checkpoint=source, tokens=tokens)


def test_a_share_that_rounds_to_nothing_is_refused_and_nothing_is_kept(dense: Line) -> None:
    store, source, tokens = dense
    work = set((store.root / "work").iterdir())
    with pytest.raises(ConfigError, match=r"channels: 0.05 of intermediate_size 32 in steps of 4 cuts none"):
        PRUNE(store, config(channels=0.05), checkpoint=source, tokens=tokens)
    assert set((store.root / "work").iterdir()) == work
