"""The chat contract along a whole line, as the command line makes, shows, verifies and adopts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tiny_line import Line, lineshaft

from lineshaft.base.store import Draft, Store


def test_every_stage_with_a_tokenizer_holds_the_same_contract_and_keeps_it(line: Line) -> None:
    store = Store(line.store)
    contracts = [store.open(line.id(step)).manifest.facts["contract"] for step in ("tokenizer", "train", "compress")]
    assert contracts[0] == contracts[1] == contracts[2]
    assert contracts[0]["chats"]["answer"]["spoken"]


def test_show_tells_the_contract_in_one_line(line: Line) -> None:
    told = lineshaft("show", line.id("train"), "--store", line.store).stdout
    assert "  contract  17 conversations (5 refused by the template), the assistant's tokens marked, 8 texts; set 1\n" in told
    assert "contract.chats" not in told
    whole = json.loads(lineshaft("show", line.id("train"), "--store", line.store, "--json").stdout)
    assert len(whole["manifest"]["facts"]["contract"]["chats"]) == 17


def test_verify_finds_an_artifact_whose_template_was_changed_by_the_stage_that_made_it(line: Line, tmp_path: Path) -> None:
    store, made = Store(tmp_path / "store"), Store(line.store).open(line.id("compress"))
    with store.draft("checkpoint", stage="careless", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        shutil.copytree(made.root, draft.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        config = draft.root / "tokenizer_config.json"
        config.write_text(config.read_text().replace(r"'Assistant: '", r"'Assistant:\\n'"))
        draft.facts |= made.manifest.facts
    done = lineshaft("verify", "--store", store.root)
    assert done.returncode == 5
    assert 'conversation "answer", token ' in done.stderr and r"\n" in done.stderr


def test_an_artifact_adopted_into_another_store_keeps_its_contract(line: Line, tmp_path: Path) -> None:
    source = Store(line.store).open(line.id("compress"))
    adopted = lineshaft("adopt", source.root, "--store", tmp_path / "store").stdout.strip()
    assert Store(tmp_path / "store").open(adopted).manifest.facts["contract"] == source.manifest.facts["contract"]
