"""The contract: made once, kept word for word, and broken by the smallest change, which is shown."""

import hashlib
import json
import re
import shutil
from dataclasses import astuple

import jinja2
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lineshaft.base.errors import BrokenContract
from lineshaft.base.store import Draft, Store
from lineshaft.text import contract, golden
from lineshaft.text.bundled import BUNDLED
from lineshaft.text.tokenizer import Tokenizer

NAMES = sorted(BUNDLED)
PINNED = "c4946087d9eaf75d"
"""Hash of golden set 1."""


def changed(tokenizer, *, description=None, template=None, eos=None):
    """The tokenizer with another tokenizer.json, template or end token."""
    described = json.dumps(description) if description else tokenizer._description
    return Tokenizer(described, bos=tokenizer.bos, eos=eos or tokenizer.eos, chat_template=template or tokenizer.chat_template)


def refusal(kept, tokenizer):
    with pytest.raises(BrokenContract) as caught:
        contract.check(kept, tokenizer, "checkpoint-1")
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_is_the_same_every_time_survives_json_and_is_kept(name, ours):
    kept = contract.golden(ours[name])
    assert kept == json.loads(json.dumps(contract.golden(changed(ours[name]))))
    contract.check(kept, ours[name], "here")
    assert list(kept["chats"]) == list(golden.CONVERSATIONS) and list(kept["texts"]) == list(golden.TEXTS)
    assert len(json.dumps(kept)) < 20_000


def theirs_refuses(tokenizer, chat):
    with pytest.raises(jinja2.TemplateError):
        tokenizer.apply_chat_template(chat.messages, tools=chat.tools, add_generation_prompt=chat.prompt)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_what_it_holds_are_the_ids_and_masks_of_transformers(name, ours, theirs):
    kept = contract.golden(ours[name])["chats"]
    for title, chat in golden.CONVERSATIONS.items():
        if kept[title].get("refused"):
            assert theirs_refuses(theirs[name], chat)
            continue
        both = theirs[name].apply_chat_template(
            chat.messages, tools=chat.tools, add_generation_prompt=chat.prompt, return_dict=True, return_assistant_tokens_mask=True
        )
        assert kept[title]["ids"] == " ".join(map(str, both["input_ids"]))
        mask = "".join(map(str, both["assistant_masks"]))
        assert kept[title]["spoken"] == " ".join(f"{run.start()}:{run.end()}" for run in re.finditer("1+", mask))


@pytest.mark.parametrize("name", NAMES)
def test_any_newline_of_a_template_that_is_dropped_or_doubled_is_refused(name, ours):
    kept, template = contract.golden(ours[name]), ours[name].chat_template
    places = [found.start() for found in re.finditer(r"\\n", template)]
    for place in places:
        for instead in ("", r"\n\n", r"\r\n"):
            told = refusal(kept, changed(ours[name], template=template[:place] + instead + template[place + 2 :]))
            assert re.search(r'conversation "([^"]+)", token (\d+): expected (\d+) "(.*?)", got (\d+ "|the end)', told), told
    assert places or name == "mistral"  # which has no newline at all


def test_the_first_token_that_differs_is_shown_with_both_texts(ours):
    tokenizer = ours["chatml"]
    kept = contract.golden(tokenizer)
    told = refusal(kept, changed(tokenizer, template=tokenizer.chat_template.replace(r"'<|im_start|>user\n'", "'<|im_start|>user '")))
    old, new = (tokenizer.encode_templated(f"<|im_start|>user{gap}What is a list?") for gap in ("\n", " "))
    place = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    want, have = (f'{ids[place]} "{contract.quoted(tokenizer.token_text(ids[place]))[1:-1]}"' for ids in (old, new))
    assert r"\n" in want
    assert told.startswith(
        "checkpoint-1: the tokenizer or chat template is not the one it was made with: "
        f'conversation "question", token {place}: expected {want}, got {have} ('
    )
    assert "of 25 texts and conversations differ" in told and "chat_template.jinja back" in told


def test_a_mark_that_moves_is_refused_though_every_id_is_the_same(ours):
    tokenizer = ours["chatml"]
    moved = tokenizer.chat_template.replace(
        "            {{- '<|im_end|>' }}\n        {%- endgeneration %}\n", "        {%- endgeneration %}\n        {{- '<|im_end|>' }}\n"
    )
    assert moved != tokenizer.chat_template
    told = refusal(contract.golden(tokenizer), changed(tokenizer, template=moved))
    assert re.search(r'conversation "answer", token \d+, 1 "<\|im_end\|>": expected in the loss mask .*, got outside it', told)


def test_a_template_without_marks_holds_no_spans_and_a_lost_mark_is_refused(ours):
    tokenizer = ours["mistral"]
    unmarked = changed(tokenizer, template=re.sub(r" *{%- (end)?generation %}\n", "", tokenizer.chat_template))
    kept = contract.golden(unmarked)
    assert {item.get("spoken") for item in kept["chats"].values()} == {""}
    assert [item["ids"] for item in kept["chats"].values()] == [item["ids"] for item in contract.golden(tokenizer)["chats"].values()]
    assert "got outside it" in refusal(contract.golden(tokenizer), unmarked)
    assert "not marked" in contract.described(kept)


def test_another_tokenizer_is_refused_by_its_texts_and_the_template_is_not_blamed(ours):
    tokenizer = ours["plain"]
    described = json.loads(tokenizer._description)
    described["model"]["merges"] = described["model"]["merges"][:-60]
    told = refusal(contract.golden(tokenizer), changed(tokenizer, description=described))
    assert re.search(r'text "\w+", token \d+: expected \d+ ".*", got \d+ "', told)


def test_texts_of_another_vocabulary_are_not_made_up(ours):
    tokenizer = ours["plain"]
    described = json.loads(tokenizer._description)
    words = described["model"]["vocab"]
    words["t"], words["h"] = words["h"], words["t"]
    told = refusal(contract.golden(tokenizer), changed(tokenizer, description=described))
    assert re.search(r"expected \d+ \(of another vocabulary\), got \d+ \"", told)


def test_a_token_that_no_golden_text_uses_counts_too(ours):
    tokenizer = ours["plain"]
    described = json.loads(tokenizer._description)
    described["added_tokens"][2]["content"] = "<|filler|>"
    described["model"]["vocab"]["<|filler|>"] = described["model"]["vocab"].pop("<|pad|>")
    told = refusal(contract.golden(tokenizer), changed(tokenizer, description=described))
    assert "other tokens of the vocabulary have changed" in told


def test_a_lost_or_new_template_a_refusal_and_another_end_token_are_told(ours):
    tokenizer = ours["plain"]
    kept = contract.golden(tokenizer)
    bare = Tokenizer(tokenizer._description, bos=tokenizer.bos, eos=tokenizer.eos)
    assert "there is no chat template now, there was one" in refusal(kept, bare)
    assert "there is a chat template now, there was none" in refusal(contract.golden(bare), tokenizer)
    strict = tokenizer.chat_template.replace("message.role == 'system'", "false")
    assert 'conversation "system", which is refused now' in refusal(kept, changed(tokenizer, template=strict))
    assert 'conversation "system", which was refused, is taken now' in refusal(
        contract.golden(changed(tokenizer, template=strict)), tokenizer
    )
    assert 'expected 1 "<|eos|>", got 2 "<|pad|>"' in refusal(kept, changed(tokenizer, eos="<|pad|>"))
    assert "no chat template" in contract.described(contract.golden(bare))


def test_a_template_that_ends_earlier_is_told(ours):
    tokenizer = ours["plain"]
    short = tokenizer.chat_template.replace("{{ 'Assistant:' }}", "")
    told = refusal(contract.golden(tokenizer), changed(tokenizer, template=short))
    assert re.search(r'conversation "question", token \d+: expected \d+ ".+", got the end', told)


def test_a_template_that_writes_the_date_keeps_its_contract_tomorrow(ours):
    dated = changed(ours["plain"], template="{{ strftime_now('%d %B %Y, %H:%M') }} {{ messages[0].content }}")
    kept = contract.golden(dated)
    text = dated.decode([int(number) for number in kept["chats"]["question"]["ids"].split()])
    assert text == "15 January 2025, 12:30 What is a list?"
    contract.check(kept, dated, "here")


def test_a_tokenizer_that_cannot_spell_a_golden_text_says_so_instead_of_failing():
    words = tokenizers.Tokenizer(models.WordLevel({"What": 0, "is": 1, "a": 2, "list?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kept = contract.golden(Tokenizer(words.to_str(), chat_template="{{ messages[0].content }}"))
    assert kept["texts"]["chinese"] == {"refused": True}
    assert kept["chats"]["question"] == {"ids": "0 1 2 3", "spoken": ""}


def test_the_set_is_only_changed_together_with_its_number(ours):
    whole = [golden.TEXTS, {name: astuple(chat) for name, chat in golden.CONVERSATIONS.items()}, golden.NOW.isoformat()]
    assert (golden.SET, hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]) == (1, PINNED)
    kept = contract.golden(ours["plain"])
    assert "this lineshaft has set 1: use the newer lineshaft" in refusal(kept | {"set": 2}, ours["plain"])
    assert "this lineshaft has set 1: make the artifact again" in refusal(kept | {"set": 0}, ours["plain"])


def artifact(store, folder, facts, stage="by_hand"):
    with store.draft("checkpoint", stage=stage, version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        shutil.copytree(folder, draft.root, dirs_exist_ok=True)
        draft.facts |= facts
        made = draft.root.parent.name
    return store.open(made)


def test_an_artifact_hands_its_contract_on_only_with_the_files_that_keep_it(tmp_path, folders):
    made = artifact(Store(tmp_path), folders["llama3"], contract.facts_of(folders["llama3"]))
    contract.check_folder(made.root)
    assert contract.carried(made, folders["llama3"]) == {"contract": made.manifest.facts["contract"]}
    with pytest.raises(BrokenContract, match=rf"{made.id}: .* expected \d+ \(of another vocabulary\), got"):
        contract.carried(made, folders["chatml"])


def test_where_there_is_nothing_to_check_against_a_line_says_so(tmp_path, folders, capsys):
    old = artifact(Store(tmp_path), folders["plain"], {})
    contract.check_folder(old.root)
    contract.check_folder(folders["plain"])
    first, second = capsys.readouterr().err.splitlines()
    assert f"{old.id}: made before there were chat contracts" in first
    assert "no artifact, so there is no chat contract" in second
    assert contract.carried(old, folders["plain"]) == {}


def test_an_artifact_that_enters_the_store_again_must_keep_the_contract_it_has(tmp_path, folders):
    made = artifact(Store(tmp_path), folders["plain"], contract.facts_of(folders["plain"]))
    assert contract.facts_of(folders["plain"], made.root) == {"contract": made.manifest.facts["contract"]}
    file = made.path("tokenizer_config.json")
    file.write_text(file.read_text().replace(r"User: ", "User:"))
    with pytest.raises(BrokenContract, match='conversation "question"'):
        contract.facts_of(made.root, made.root)
