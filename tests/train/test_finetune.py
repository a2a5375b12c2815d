"""Training a finished checkpoint further."""

from __future__ import annotations

from pathlib import Path

import letter_line
import pytest
import torch

from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.ops.formats import Integer
from lineshaft.train.finetune import FINETUNE, FinetuneConfig
from lineshaft.train.stage import PRETRAIN

Line = tuple[Store, dict[str, Artifact]]


@pytest.fixture
def trained(line: Line) -> tuple[Store, Artifact, Artifact]:
    store, parents = line
    return store, PRETRAIN(store, letter_line.config(), **parents), parents["tokens"]


def config(**changes: object) -> FinetuneConfig:
    same = letter_line.config().model_dump(exclude={"model"})
    return FinetuneConfig.model_validate(same | changes)


def test_it_goes_on_from_the_weights_it_was_given(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, tokens = trained
    after = FINETUNE(store, config(), checkpoint=before, tokens=tokens)
    assert after.manifest.facts["final_loss"] < before.manifest.facts["final_loss"]
    assert store.open(before.id).manifest.digest == before.manifest.digest  # its mapped weights were not written to
    assert load_checkpoint(after.root).config == load_checkpoint(before.root).config


def test_experts_that_join_begin_silent_and_learn(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, tokens = trained
    after = load_checkpoint(FINETUNE(store, config(added_experts=1), checkpoint=before, tokens=tokens).root)
    assert after.config.moe is not None
    assert after.config.moe.n_added_experts == 1
    gates = [parameter for name, parameter in after.named_parameters() if name.endswith("added_experts.0.gate.weight")]
    assert gates
    assert all(gate.any() for gate in gates)


def test_experts_a_token_can_be_changed(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, tokens = trained
    after = load_checkpoint(FINETUNE(store, config(active_experts=3), checkpoint=before, tokens=tokens).root)
    assert after.config.moe is not None
    assert after.config.moe.num_experts_per_tok == 3
    with pytest.raises(ConfigError, match="5 is more than the 4 experts in reach"):
        FINETUNE(store, config(active_experts=5), checkpoint=before, tokens=tokens)


def test_a_compressed_checkpoint_is_not_trained(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, tokens = trained
    model = load_checkpoint(before.root)
    model.model.layers[0].mlp.gate_proj.recode(Integer(8))
    with store.draft("checkpoint", stage="by_hand", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        save_checkpoint(model, draft.root, before.root)
    (small,) = [item for item in store.all() if item.stage == "by_hand" and item.kind == "checkpoint"]
    with pytest.raises(ConfigError, match=r"is compressed .* train the dense checkpoint"):
        FINETUNE(store, config(), checkpoint=store.open(small.id), tokens=tokens)


def test_tokens_of_another_tokenizer_are_refused(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, _ = trained
    other = letter_line.tokens(store, letter_line.tokenizer(store, version=2), letter_line.documents(1, 9), letter_line.documents(2, 9))
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        FINETUNE(store, config(), checkpoint=before, tokens=other)


def test_rows_longer_than_the_context_are_refused(trained: tuple[Store, Artifact, Artifact]) -> None:
    store, before, tokens = trained
    with pytest.raises(ConfigError, match="sequence_tokens 128 exceeds"):
        FINETUNE(store, config(sequence_tokens=128), checkpoint=before, tokens=tokens)


def test_equal_requests_give_equal_bytes(trained: tuple[Store, Artifact, Artifact], tmp_path: Path) -> None:
    store, before, tokens = trained
    first = FINETUNE(store, config(added_experts=1), checkpoint=before, tokens=tokens)
    store2, parents = letter_line.parents(tmp_path / "again")
    torch.manual_seed(7)
    before2 = PRETRAIN(store2, letter_line.config(), **parents)
    second = FINETUNE(store2, config(added_experts=1), checkpoint=before2, tokens=parents["tokens"])
    assert first.manifest.digest == second.manifest.digest
