"""The chat contract along a whole line, as the command line makes, shows, verifies and adopts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from calling import call
from tiny_line import Line

from lineshaft.base.store import Draft, Store


def test_every_stage_with_a_tokenizer_holds_the_same_contract_and_keeps_it(line: Line) -> None:
    store = Store(line.store)
    contracts = [store.open(line.id(step)).manifest.facts["contract"] for step in ("tokenizer", "train", "compress")]
    assert contracts[0] == contracts[1] == contracts[2]
    assert contracts[0]["chats"]["answer"]["spoken"]


def test_show_tells_the_contract_in_one_line(line: Line) -> None:
    told = call("show", line.id("train"), "--store", line.store)[1]
    assert "  contract  17 conversations (5 refused by the template), the assistant's tokens marked, 8 texts; set 1\n" in told
    assert "contract.chats" not in told
    whole = json.loads(call("show", line.id("train"), "--store", line.store, "--json")[1])
    assert len(whole["manifest"]["facts"]["contract"]["chats"]) == 17


def test_verify_finds_an_artifact_whose_template_was_changed_by_the_stage_that_made_it(line: Line, tmp_path: Path) -> None:
    store, made = Store(tmp_path / "store"), Store(line.store).open(line.id("compress"))
    with store.draft("checkpoint", stage="careless", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        shutil.copytree(made.root, draft.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        config = draft.root / "tokenizer_config.json"
        config.write_text(config.read_text().replace(r"'Assistant: '", r"'Assistant:\\n'"))
        draft.facts |= made.manifest.facts
    code, told = call("verify", "--store", store.root)
    assert code == 5
    assert 'conversation "answer", token ' in told and r"\n" in told


def test_an_artifact_adopted_into_another_store_keeps_its_contract(line: Line, tmp_path: Path) -> None:
    source = Store(line.store).open(line.id("compress"))
    code, adopted = call("adopt", source.root, "--store", tmp_path / "store")
    assert code == 0, adopted
    adopted = adopted.strip()
    assert Store(tmp_path / "store").open(adopted).manifest.facts["contract"] == source.manifest.facts["contract"]
