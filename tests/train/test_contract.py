"""The trainer keeps the chat contract of its tokenizer, and refuses one that is broken, before and after the training."""

from __future__ import annotations

from pathlib import Path

import letter_line
import planted
import pytest

from lineshaft.base.errors import BrokenContract
from lineshaft.base.store import Artifact, Store
from lineshaft.train import stage
from lineshaft.train.stage import PRETRAIN


def parents(store: Store, *, lost: bool) -> dict[str, Artifact]:
    words = planted.with_template(store, "tokenizer", lost=lost)
    return {
        "tokenizer": words,
        "tokens": letter_line.tokens(store, words, letter_line.documents(1, 20), letter_line.documents(2, 5)),
    }


def test_the_checkpoint_carries_the_contract_of_its_tokenizer(tmp_path: Path) -> None:
    given = parents(Store(tmp_path), lost=False)
    made = PRETRAIN(Store(tmp_path), letter_line.config(steps=1), **given)
    assert made.manifest.facts["contract"] == given["tokenizer"].manifest.facts["contract"]


def test_a_newline_that_the_template_has_lost_is_refused_before_a_step_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parents(Store(tmp_path), lost=True)
    monkeypatch.setattr(stage.loop, "run", None)
    with pytest.raises(BrokenContract, match=f"{given['tokenizer'].id}: .*{planted.SHOWN}"):
        PRETRAIN(Store(tmp_path), letter_line.config(), **given)


def test_a_checkpoint_written_with_another_template_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parents(Store(tmp_path), lost=False)
    plain = stage.save_checkpoint

    def careless(model: object, folder: Path, tokenizer_from: Path) -> None:
        plain(model, folder, tokenizer_from)
        config = folder / "tokenizer_config.json"
        config.write_text(config.read_text().replace(r"{{ '\\n' }}", ""))

    monkeypatch.setattr(stage, "save_checkpoint", careless)
    with pytest.raises(BrokenContract, match=planted.SHOWN):
        PRETRAIN(Store(tmp_path), letter_line.config(steps=1), **given)
    assert not list((tmp_path / "artifacts").glob("checkpoint-*"))


def test_a_tokenizer_of_an_older_version_trains_with_a_word_about_it(
    line: tuple[Store, dict[str, Artifact]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, older = line
    made = PRETRAIN(store, letter_line.config(steps=1), **older)
    assert "contract" not in made.manifest.facts
    assert f"{older['tokenizer'].id}: made before there were chat contracts" in capsys.readouterr().err
