"""Multi-token-prediction layers: read, run as transformers runs them, and never lost on the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import TOKENS, Theirs, agree, load_with_prediction_layers, logits_of, predicted_by_transformers, prompt, with_prediction_layers

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model import mtp
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, load_config, save_checkpoint
from lineshaft.model.decoder import Decoder

Get = Callable[[str], Theirs]
NAMES = ["deepseek", "grid-yarn-qlora-4groups-1dense", "grid-plain-direct-1groups-0dense"]


@pytest.fixture(params=[(1, False), (1, True), (2, False), (2, True)], ids=["one", "one-with-copies", "two", "two-with-copies"])
def layers(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(zip(("count", "copies"), request.param, strict=True))


def drafts(model: Decoder, tokens: list[int]) -> list[Tensor]:
    """Ours, of each prediction layer k: logits [T - 1 - k, vocabulary], row t speaking of token t + k + 2."""
    out = []
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), PackedCausal([0], len(tokens)))
        for k in range(model.config.num_nextn_predict_layers):
            ahead = torch.tensor(tokens[k + 1 :])
            hidden = model.draft(k, hidden[:-1], ahead, torch.arange(len(ahead)), PackedCausal([0], len(ahead)))
            out.append(model.logits(hidden))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_transformers(name: str, layers: dict[str, Any], theirs: Get, tmp_path: Path) -> None:
    folder = with_prediction_layers(theirs(name).folder, tmp_path / "mtp", **layers)
    ours, expected = drafts(load_checkpoint(folder), prompt(TOKENS)), predicted_by_transformers(folder, prompt(TOKENS))
    assert len(ours) == len(expected) == layers["count"]
    assert all(agree(mine, other) for mine, other in zip(ours, expected, strict=True))


def test_the_next_token_is_what_it_is_without_them(layers: dict[str, Any], theirs: Get, tmp_path: Path) -> None:
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", **layers)
    assert agree(logits_of(load_checkpoint(folder), prompt(TOKENS)), theirs("deepseek").logits(prompt(TOKENS)))


def lost_in_export(before: Path, after: Path) -> list[str]:
    """Tensors of a checkpoint that another one lacks or changed; copies of the model's own table and head may go."""
    mine, other = (load_file(folder / "model.safetensors") for folder in (after, before))
    copies = (".embed_tokens.weight", ".shared_head.head.weight")
    needed = [name for name in other if not (name.startswith("model.layers.") and name.endswith(copies))]
    return [name for name in needed if name not in mine or not torch.equal(mine[name], other[name])]


def test_what_we_save_holds_them_and_transformers_runs_them(layers: dict[str, Any], theirs: Get, tmp_path: Path) -> None:
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", **layers)
    save_checkpoint(load_checkpoint(folder), tmp_path / "out", folder)
    assert lost_in_export(folder, tmp_path / "out") == []
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == layers["count"]
    expected, got = (predicted_by_transformers(path, prompt(TOKENS)) for path in (folder, tmp_path / "out"))
    assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))
    kept = load_with_prediction_layers(tmp_path / "out").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in theirs("deepseek").model.state_dict().items())


def test_an_export_that_loses_them_is_caught(theirs: Get, tmp_path: Path) -> None:
    """The planted bug: the trunk is written alone, as some tools do."""
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 1)
    model = load_checkpoint(folder)
    del model.model.layers[model.config.num_hidden_layers :]
    save_checkpoint(model, tmp_path / "out", folder)
    assert lost_in_export(folder, tmp_path / "out")


def test_a_prediction_layer_with_missing_tensors_is_refused(theirs: Get, tmp_path: Path) -> None:
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 2)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.4.eh_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.4\.eh_proj\.weight"):
        load_checkpoint(folder)


def test_a_checkpoint_that_lost_them_before_answers_as_it_did(theirs: Get, tmp_path: Path) -> None:
    """transformers drops them on saving and goes on saying in config.json that they are there."""
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 1)
    load_with_prediction_layers(folder).save_pretrained(tmp_path / "lost")
    assert json.loads((tmp_path / "lost/config.json").read_text())["num_nextn_predict_layers"] == 1
    found = load_checkpoint(tmp_path / "lost")
    assert found.config.num_nextn_predict_layers == 0
    assert agree(logits_of(found, prompt(TOKENS)), theirs("deepseek").logits(prompt(TOKENS)))


def test_the_config_names_their_number(layers: dict[str, Any], theirs: Get, tmp_path: Path) -> None:
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", **layers)
    assert load_config(folder).num_nextn_predict_layers == layers["count"]


def hidden_state_first(patch: pytest.MonkeyPatch) -> None:
    right = mtp.PredictionLayer.predict

    def wrong(self: mtp.PredictionLayer, hidden: Tensor, ahead: Tensor, *rest: Any) -> Tensor:
        self.enorm, self.hnorm = self.hnorm, self.enorm
        return right(self, ahead, hidden, *rest)

    patch.setattr(mtp.PredictionLayer, "predict", wrong)


def its_norm_dropped(patch: pytest.MonkeyPatch) -> None:
    right = mtp.PredictionLayer.predict

    def wrong(self: mtp.PredictionLayer, *given: Any) -> Tensor:
        self.shared_head.norm = torch.nn.Identity()
        return right(self, *given)

    patch.setattr(mtp.PredictionLayer, "predict", wrong)


def from_before_the_final_norm(patch: pytest.MonkeyPatch) -> None:
    right = Decoder.hidden

    def wrong(self: Decoder, *given: Any) -> Tensor:
        self.model.norm = torch.nn.Identity()
        return right(self, *given)

    patch.setattr(Decoder, "hidden", wrong)


def embeddings_of_another_token(patch: pytest.MonkeyPatch) -> None:
    right = mtp.PredictionLayer.predict
    patch.setattr(mtp.PredictionLayer, "predict", lambda self, hidden, ahead, *rest: right(self, hidden, ahead.roll(1, 0), *rest))


@pytest.mark.parametrize("plant", [hidden_state_first, its_norm_dropped, from_before_the_final_norm, embeddings_of_another_token])
def test_a_planted_bug_turns_the_comparison_red(
    plant: Callable[[pytest.MonkeyPatch], None], theirs: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 1)
    expected = predicted_by_transformers(folder, prompt(TOKENS))
    plant(monkeypatch)
    assert not agree(drafts(load_checkpoint(folder), prompt(TOKENS))[0], expected[0])
