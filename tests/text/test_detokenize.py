"""Streaming detokenizing against the whole answer decoded at once."""

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from lineshaft.text.detokenize import Detokenizer

LINES = [
    "the quick brown fox",
    "你好，世界！今天的价格是多少？",
    "émigré naïve e\u0301 नमस्ते",
    "😀👩\u200d👩\u200d👧 ok 🇩🇪",
    "a\u0300b 价格 brown the the",
] * 4
SPECIAL = ["<eos>", "<bos>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


class Plain:
    """The part of our Tokenizer that a Detokenizer uses, over any `tokenizers` object."""

    def __init__(self, library):
        self.library = library
        self.vocab_size = library.get_vocab_size()
        self.calls = 0

    def encode(self, text):
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        self.calls += len(ids)
        return self.library.decode(list(ids), skip_special_tokens=True)


def byte_level():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    return Plain(library)


def sentencepiece_like():
    """Llama 2's arrangement: a space before the text, byte fallback, and a decoder that strips that space."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz你好é"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(SPECIAL)
    return Plain(library)


BYTES, PIECES = byte_level(), sentencepiece_like()


def single_bytes(text):
    """One token for each byte of the text."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [BYTES.library.token_to_id(letter) for word, _ in spelled for letter in word]


def streamed(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return "".join([*(stream.push(number) for number in ids), stream.finish()])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=120))
def test_random_byte_level_ids_give_the_text_of_the_whole(ids):
    assert streamed(BYTES, ids) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255).map(lambda byte: BYTES.library.token_to_id(LETTERS[byte])), max_size=200))
def test_a_long_run_of_damaged_bytes_gives_the_text_of_the_whole(ids):
    assert streamed(BYTES, ids) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_comes_back_whole_through_byte_level_tokens(text):
    assert streamed(BYTES, BYTES.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("the 你好é😀 \u0301"), st.characters(exclude_categories=["Cs"])), max_size=60))
def test_any_text_comes_back_whole_through_sentencepiece_like_tokens(text):
    ids = PIECES.encode(text)
    assert streamed(PIECES, ids) == PIECES.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, PIECES.vocab_size - 1), max_size=80))
def test_random_sentencepiece_like_ids_never_fail(ids):
    assert isinstance(streamed(PIECES, ids), str)


def test_a_chinese_character_of_three_tokens_is_held_until_its_last_byte():
    ids = single_bytes("罕")
    stream = Detokenizer(BYTES)
    assert [stream.push(number) for number in ids] == ["", "", "罕"]
    assert stream.finish() == ""


def test_an_incomplete_character_at_the_end_becomes_one_replacement_character():
    ids = single_bytes("罕")
    assert streamed(BYTES, [*BYTES.encode("ok"), *ids[:2]]) == "ok\ufffd"


def test_plain_text_is_never_held_back():
    stream = Detokenizer(BYTES)
    assert all(stream.push(number) for number in BYTES.encode("the quick brown fox"))


def test_the_space_before_a_word_after_a_special_token_is_kept():
    ids = [*PIECES.encode("the"), PIECES.library.token_to_id("<eos>"), *PIECES.encode("the")]
    assert streamed(PIECES, ids) == PIECES.decode(ids) == "the the"


@pytest.mark.parametrize("name", ["text", "damaged bytes", "special tokens", "special tokens first"])
def test_work_for_a_token_does_not_grow_with_the_answer(name):
    eos = BYTES.library.token_to_id("<eos>")
    ids = {
        "text": BYTES.encode("你好 the fox 😀") * 200,
        "damaged bytes": [BYTES.library.token_to_id("Ģ")] * 2000,  # 0x80: goes on with a character that never began
        "special tokens": [*BYTES.encode("ok"), *[eos] * 2000],
        "special tokens first": [eos] * 2000,
    }[name]
    BYTES.calls = 0
    streamed(BYTES, ids)
    assert BYTES.calls < 100 * len(ids)


def test_ten_thousand_tokens_take_well_under_a_second_each_thousand():
    ids = BYTES.encode("价格 brown fox ") * 1200
    started = time.perf_counter()
    streamed(BYTES, ids)
    assert (time.perf_counter() - started) / len(ids) < 0.001
