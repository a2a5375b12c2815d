"""The tokenizer wrapper on folders of several makes, against transformers and `tokenizers`."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Raw
from transformers import AutoTokenizer

from lineshaft.base.errors import BadCheckpoint, RequestError, UnsupportedModel
from lineshaft.text.tokenizer import Tokenizer, byte_alphabet

END = {"__type": "AddedToken", "content": "</s>", "special": True} | dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
LINES = ["the shaft turns every machine", "the engine keeps the time", "今天天气很好，我们去看机器"] * 5
ANYTHING = st.text(alphabet=st.characters(codec="utf-8"))


def byte_level() -> Raw:
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(byte_alphabet()), show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    raw.add_tokens([AddedToken("<think>", special=False)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.enable_truncation(5)
    raw.enable_padding()
    return raw


def sentencepiece_like() -> Raw:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for line in LINES for letter in line.replace(" ", "▁")})
    pairs = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *letters, "th", "the", "▁the"])}
    raw = Raw(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return raw


def folder(path: Path, raw: Raw, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    raw.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("byte_level"), byte_level(), bos_token="<s>", eos_token=END)


@pytest.fixture(scope="module")
def loaded(ours: Path) -> Tokenizer:
    return Tokenizer.load(ours)


@pytest.fixture(scope="module")
def theirs(ours: Path):
    return AutoTokenizer.from_pretrained(ours)


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return Tokenizer(sentencepiece_like().to_str(), bos="<s>", eos="</s>")


def test_our_byte_alphabet_is_the_librarys():
    assert byte_alphabet().keys() == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_special_tokens_may_be_texts_or_objects(loaded: Tokenizer):
    assert (loaded.bos, loaded.bos_id, loaded.eos, loaded.eos_id) == ("<s>", 0, "</s>", 1)
    assert loaded.chat_template is None


def test_nothing_is_added_cut_or_padded(loaded: Tokenizer):
    long, short = loaded.encode_batch(["the shaft turns every machine " * 3, "a"])
    assert len(long) > 5 and len(short) == 1 and 0 not in long


def test_the_text_of_a_special_token_is_special_only_in_a_template(loaded: Tokenizer):
    assert loaded.encode_templated("<s>a</s>")[0] == 0
    assert 0 not in loaded.encode("<s>a</s>") and 1 not in loaded.encode("<s>a</s>")
    assert loaded.decode(loaded.encode("<s>a</s>")) == "<s>a</s>"
    assert loaded.decode(loaded.encode_templated("<s>a</s>")) == "a"


@given(ANYTHING)
def test_ids_are_those_of_transformers(loaded: Tokenizer, theirs, text: str):
    assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True, truncation=False)
    assert loaded.encode_templated(text) == theirs.encode(text, add_special_tokens=False, truncation=False)
    assert loaded.encode_batch([text, text]) == [loaded.encode(text)] * 2


@given(ANYTHING)
def test_bytes_of_tokens_put_together_are_the_text(loaded: Tokenizer, text: str):
    table = loaded.token_bytes()
    assert len(table) == loaded.vocab_size
    assert b"".join(table[number] for number in loaded.encode(text)) == text.encode()


def test_special_tokens_have_no_bytes_and_other_added_ones_have(loaded: Tokenizer):
    table = loaded.token_bytes()
    assert table[0] == table[1] == b""
    assert table[loaded.encode("<think>")[0]] == b"<think>"


@given(ANYTHING.filter(lambda text: "▁" not in text))
def test_sentencepiece_bytes_keep_the_space_in_front(pieces: Tokenizer, text: str):
    ids = pieces.encode(text)
    table = pieces.token_bytes()
    assert b"".join(table[number] for number in ids) == (f" {text}".encode() if text else b"")
    assert pieces.decode(ids) == text


def test_a_decoder_without_bytes_is_refused():
    raw = Raw(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match=r"decoder \(WordPiece\) says nothing about single tokens' bytes"):
        Tokenizer(raw.to_str()).token_bytes()


def test_vocab_size_is_above_the_highest_id_even_with_gaps():
    raw = Raw(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    assert Tokenizer(raw.to_str()).vocab_size == 8


def test_half_a_surrogate_pair_is_a_request_error(loaded: Tokenizer):
    for call in (loaded.encode, loaded.encode_templated, lambda text: loaded.encode_batch([text])):
        with pytest.raises(RequestError, match="character 1 is half of a surrogate pair"):
            call("a\ud83d")


@pytest.mark.parametrize(
    ("config", "jinja", "found"),
    [
        ({"chat_template": "in config"}, None, "in config"),
        ({"chat_template": "in config"}, "in file", "in file"),
        ({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({}, None, None),
    ],
)
def test_the_chat_template_is_found(tmp_path: Path, config: dict[str, object], jinja: str | None, found: str | None):
    path = folder(tmp_path, byte_level(), **config)
    if jinja:
        (path / "chat_template.jinja").write_text(jinja)
    assert Tokenizer.load(path).chat_template == found


def test_a_folder_with_tokenizer_json_alone_is_enough(tmp_path: Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    alone = Tokenizer.load(tmp_path)
    assert (alone.bos, alone.bos_id, alone.eos_id, alone.chat_template) == ("", None, None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE"', "is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": "<begin>"}', 'bos_token "<begin>" is not in the vocabulary'),
        ("tokenizer_config.json", b'{"eos_token": 3}', "a special token must be a text"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be a text"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str):
    path = folder(tmp_path, byte_level())
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        Tokenizer.load(path)
