"""What a GGUF file says of a tokenizer, and which tokenizers it can't say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_toys import CUTS, SENTENCES, SPECIAL, VISIBLE, tokenizer_of, with_tokenizer
from tokenizers import Tokenizer

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.compress.export.exporting import export
from lineshaft.compress.export.gguf_tokenizer import vocabulary
from lineshaft.data.tokenizer import TokenizerConfig, train
from lineshaft.model.config import ModelConfig
from lineshaft.model.folder import load_config
from lineshaft.text.tokenizer import byte_alphabet

gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'lineshaft[export]'")

Source = Callable[..., Path]
Table = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, source: Source) -> Path:
    """A checkpoint of 720 tokens, of which the tokenizer has fewer."""
    copy = shutil.copytree(source("llama-tied"), tmp_path / "hf")
    return with_tokenizer(copy, "llama-bpe")


@pytest.fixture
def config(source: Source) -> ModelConfig:
    return load_config(source("llama-tied")).model_copy(update={"vocab_size": 720})


def changed(folder: Path, **changes: Any) -> Path:
    table = json.loads((folder / "tokenizer.json").read_text())
    for place, value in changes.items():
        *path, last = place.split("__")
        inner = table
        for part in path:
            inner = inner[part]
        inner[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("cut", sorted(CUTS.keys() - {"ours"}))
def test_published_ways_of_cutting_have_their_names(cut: str, folder: Path, config: ModelConfig) -> None:
    assert vocabulary(with_tokenizer(folder, cut), config)["tokenizer.ggml.pre"] == cut


@pytest.mark.parametrize(("cut", "name"), [("llama3", "smaug-bpe"), ("qwen2", "qwen2"), ("deepseek3", "deepseek-v3")])
def test_tokenizers_trained_here_can_have_a_name(cut: str, name: str, folder: Path, config: ModelConfig) -> None:
    with_tokenizer(folder, "ours")
    trained = train(iter(SENTENCES * 9), load(TokenizerConfig, {"vocab_size": 400, "cut": cut}))
    (folder / "tokenizer.json").write_text(trained.to_str(), encoding="utf-8")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}))
    assert vocabulary(folder, config)["tokenizer.ggml.pre"] == name


def test_a_way_of_cutting_without_a_name_is_refused(folder: Path, config: ModelConfig) -> None:
    with pytest.raises(UnsupportedModel, match=r"no name for.*--tokenizer none"):
        vocabulary(with_tokenizer(folder, "ours"), config)


def test_tokens_merges_and_types_are_those_of_the_file(folder: Path, config: ModelConfig) -> None:
    said, theirs = vocabulary(folder, config), Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = theirs.get_vocab_size(with_added_tokens=True)
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert tokens[:size] == [theirs.id_to_token(number) for number in range(size)]
    assert tokens[size:] == [f"[PAD{number}]" for number in range(size, 720)]
    kinds = [gguf.TokenType.NORMAL] * size + [gguf.TokenType.UNUSED] * (720 - size)
    for token, kind in [*((one, gguf.TokenType.CONTROL) for one in SPECIAL), *((one, gguf.TokenType.USER_DEFINED) for one in VISIBLE)]:
        kinds[theirs.token_to_id(token)] = kind
    assert types == kinds
    assert [merge.split(" ") for merge in said["tokenizer.ggml.merges"]] == json.loads(theirs.to_str())["model"]["merges"]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (0, 2)
    assert said["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert said["tokenizer.ggml.add_bos_token"] is said["tokenizer.ggml.add_eos_token"] is False


def test_merges_may_be_written_as_one_text_each(folder: Path, config: ModelConfig) -> None:
    before = vocabulary(folder, config)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert vocabulary(changed(folder, model__merges=[" ".join(pair) for pair in merges]), config) == before


TEMPLATE: Table = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [0], "tokens": [SPECIAL[0]]}},
}
QWEN2: Table = json.loads(tokenizer_of("qwen2", 300).to_str())["pre_tokenizer"]
BYTES: Table = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("processor", "said_in_config", "wanted"),
    [
        (None, {}, (False, False)),
        (BYTES, {}, (False, False)),
        (TEMPLATE, {}, (True, False)),
        ({"type": "Sequence", "processors": [BYTES, TEMPLATE]}, {}, (True, False)),
        (TEMPLATE, {"add_bos_token": False}, (False, False)),
        (None, {"add_bos_token": True, "add_eos_token": None}, (True, False)),
    ],
)
def test_tokens_that_come_by_themselves(
    processor: Table | None, said_in_config: Table, wanted: tuple[bool, bool], folder: Path, config: ModelConfig
) -> None:
    changed(folder, post_processor=processor)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said_in_config))
    said = vocabulary(folder, config)
    assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == wanted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"model__dropout": 0.1}, "dropout"),
        ({"model__byte_fallback": True}, "not byte-level"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        (
            {"model__ignore_merges": True, "pre_tokenizer": json.loads(tokenizer_of("qwen2", 300).to_str())["pre_tokenizer"]},
            "ignore_merges",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, "ByteLevel"),
        ({"post_processor": {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2], "trim_offsets": True}}, "post_processor"),
    ],
)
def test_what_llama_cpp_would_do_in_another_way_is_refused(
    changes: Table, told: str, folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Tokenizer.from_str
    before = (folder / "tokenizer.json").read_text()
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", lambda _: loaded(before))  # the library itself refuses some of these
    with pytest.raises(UnsupportedModel, match=told):
        vocabulary(changed(folder, **changes), config)


@pytest.mark.parametrize("field", ["lstrip", "rstrip", "single_word"])
def test_a_special_token_that_takes_what_is_beside_it_is_refused(field: str, folder: Path, config: ModelConfig) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added[1][field] = True
    with pytest.raises(UnsupportedModel, match=field):
        vocabulary(changed(folder, added_tokens=added), config)


def test_ends_of_an_answer_are_told_or_refused(folder: Path, config: ModelConfig) -> None:
    several = vocabulary(folder, config.model_copy(update={"eos_token_ids": [5, 6, 7]}))
    assert [several[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [5, 6, 7]
    none = config.model_copy(update={"eos_token_ids": []})
    assert vocabulary(folder, none)["tokenizer.ggml.eos_token_id"] == 1  # the tokenizer's own
    with pytest.raises(UnsupportedModel, match="4 tokens that end an answer"):
        vocabulary(folder, config.model_copy(update={"eos_token_ids": [5, 6, 7, 8]}))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(BadCheckpoint, match="eos_token_id"):
        vocabulary(folder, none)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, config: ModelConfig) -> None:
    with pytest.raises(BadCheckpoint, match="belongs to another"):
        vocabulary(folder, config.model_copy(update={"vocab_size": 100}))


def test_a_text_in_normal_form_c_is_asked_for(folder: Path, config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary(with_tokenizer(folder, "qwen2"), config)
    assert "normal form C" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_needs_the_word_none(source: Source, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json"):
        export(source("llama-tied"), tmp_path / "m.gguf", "gguf")
    export(source("llama-tied"), tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.model").contents() == "no_vocab"


def test_every_byte_is_a_letter_of_their_alphabet() -> None:
    """GPT-2's table, which llama.cpp decodes pieces by."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {letter: byte for byte, letter in bytes_to_unicode().items()}
