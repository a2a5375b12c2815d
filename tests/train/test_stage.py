"""The training stage on tiny artifacts."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import letter_line
import pytest
import torch
from transformers import AutoModelForCausalLM

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError, TrainingError
from lineshaft.base.store import Artifact, Store
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.train import stage
from lineshaft.train.batches import Batch
from lineshaft.train.objective import Loss, NextToken
from lineshaft.train.stage import HISTORY_FILE, PRETRAIN, TrainConfig

Line = tuple[Store, dict[str, Artifact]]


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    def digest(folder: str, seed: int) -> str:
        store, parents = letter_line.parents(tmp_path / folder)
        made = PRETRAIN(store, letter_line.config(seed=seed), **parents)
        store.open(made.id)
        return made.manifest.digest

    torch.manual_seed(1)
    first = digest("a", 1)
    torch.manual_seed(2)
    assert digest("b", 1) == first
    assert digest("c", 2) != first


def test_the_model_learns_more_than_how_often_each_letter_comes(line: Line) -> None:
    store, parents = line
    made = PRETRAIN(store, letter_line.config(steps=150, save_every=150, log_every=10, rows=8), **parents)
    counts = Counter(token for document in letter_line.documents(1, 120) for token in document[1:])
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    facts = made.manifest.facts
    assert facts["final_loss"] < 0.75 * entropy
    assert facts["tokens"] == 150 * 8 * 16
    assert facts["epochs"] == pytest.approx(facts["tokens"] / parents["tokens"].manifest.facts["train"]["tokens"])
    assert made.manifest.aside["tokens_per_second"] > 0


def test_the_checkpoint_is_one_that_transformers_loads_and_reads_the_same(line: Line) -> None:
    store, parents = line
    made = PRETRAIN(store, letter_line.config(), **parents)
    names = {item.name for item in made.manifest.files}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", HISTORY_FILE}
    text = torch.tensor(letter_line.documents(5, 1)[0])
    theirs = AutoModelForCausalLM.from_pretrained(made.root, dtype=torch.float32)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (letter_line.BOS, letter_line.EOS)
    ours = load_checkpoint(made.root)
    with torch.inference_mode():
        logits = ours(text, torch.arange(len(text)), PackedCausal([0], len(text)))
        torch.testing.assert_close(logits, theirs(text[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_the_history_is_plain_json_lines(line: Line) -> None:
    store, parents = line
    made = PRETRAIN(store, letter_line.config(), **parents)
    history = [json.loads(entry) for entry in made.path(HISTORY_FILE).read_text().splitlines()]
    assert all(entry.keys() == {"step", "loss", "lr", "grad_norm", "tokens"} for entry in history)
    assert history[-1]["loss"] == made.manifest.facts["final_loss"]


def test_a_loss_that_is_no_number_leaves_nothing(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line

    def infinite(self: NextToken, model: Decoder, batch: Batch) -> Loss:
        loss = model.model.norm.weight.sum() * math.inf
        return Loss(loss, loss)

    monkeypatch.setattr(stage.NextToken, "__call__", infinite)
    with pytest.raises(TrainingError, match="step 1 has a loss of inf"):
        PRETRAIN(store, letter_line.config(), **parents)
    assert {item.kind for item in store.all()} == {"tokenizer", "tokens"}
    assert not list((store.root / "work").glob("*/payload"))


def test_a_text_shorter_than_a_row_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    letters = letter_line.tokenizer(store)
    short = letter_line.tokens(store, letters, [[0, 5, 6, 1]], [[0, 5, 1]])
    with pytest.raises(TrainingError, match=r"has 4 tokens, too few for one row of 16 .*: give more text or a smaller sequence_tokens"):
        PRETRAIN(store, letter_line.config(), tokens=short, tokenizer=letters)
    assert {item.kind for item in store.all()} == {"tokenizer", "tokens"}


def test_tokens_made_with_another_tokenizer_are_refused(line: Line) -> None:
    store, parents = line
    other = letter_line.tokenizer(store, version=2)
    with pytest.raises(ConfigError, match=f"was made with {parents['tokenizer'].id}, not with {other.id}"):
        PRETRAIN(store, letter_line.config(), tokens=parents["tokens"], tokenizer=other)


def test_rows_longer_than_the_models_context_are_refused(line: Line) -> None:
    store, parents = line
    with pytest.raises(ConfigError, match="sequence_tokens 65 exceeds the model's max_position_embeddings 64"):
        PRETRAIN(store, letter_line.config(sequence_tokens=65), **parents)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match='"seed"'):
        load(TrainConfig, {"seed": seed})


def test_auto_precision_is_settled_before_the_key_is_taken_and_alike_on_all_processors(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    _, parents = line
    ids = set()
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        request = PRETRAIN.request(letter_line.config(precision="auto"), **parents)
        assert request.config.loop.precision == "float32"
        ids.add(request.id)
    assert len(ids) == 1
