"""Token shards: exactly the documents, whatever the shard size, and damage is found."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lineshaft.base.errors import Corrupt, UnsupportedModel
from lineshaft.base.store import Store
from lineshaft.data.tokens import TOKENIZE, TokenizeConfig
from lineshaft.records.corpus import SPLITS, read_corpus
from lineshaft.records.tokens import TokenStream


@pytest.mark.parametrize("split", SPLITS)
def test_shards_hold_what_transformers_makes_of_the_documents(tokens, corpus, tokenizer, split):
    theirs = AutoTokenizer.from_pretrained(tokenizer.root)
    stream = TokenStream(tokens, split)
    expected = [[0, *theirs.encode(item.text, add_special_tokens=False), 1] for item in read_corpus(corpus, split)]
    assert stream.read(0, len(stream)).tolist() == [number for ids in expected for number in ids]
    assert stream.starts().tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()


def test_shard_borders_do_not_show(tmp_path: Path, tokens, corpus, tokenizer):
    assert len(list(tokens.root.glob("train-*.bin"))) > 5
    whole = TokenStream(TOKENIZE(Store(tmp_path), TokenizeConfig(), corpus=corpus, tokenizer=tokenizer), "train")
    cut = TokenStream(tokens, "train")
    assert len(whole) == len(cut)
    for first in range(0, len(cut) - 300, 97):
        assert np.array_equal(cut.read(first, first + 300), whole.read(first, first + 300))


def test_the_facts_hold(tokens, corpus, tokenizer):
    facts = tokens.manifest.facts
    assert facts["tokenizer_sha256"] == next(item.sha256 for item in tokenizer.manifest.files if item.name == "tokenizer.json")
    assert (facts["dtype"], facts["vocab_size"], facts["bos_id"], facts["eos_id"]) == ("uint16", 400, 0, 1)
    for split in SPLITS:
        counts = corpus.manifest.facts["splits"][split]
        assert facts[split] == {"tokens": len(TokenStream(tokens, split)), "documents": counts["documents"], "bytes": counts["bytes"]}


def test_two_stores_give_equal_digests(tmp_path: Path, tokens, corpus, tokenizer):
    again = TOKENIZE(Store(tmp_path), TokenizeConfig(shard_tokens=700), corpus=corpus, tokenizer=tokenizer)
    assert (again.id, again.manifest.digest) == (tokens.id, tokens.manifest.digest)


def test_a_flipped_bit_in_a_shard_is_found_on_read(tmp_path: Path, corpus, tokenizer):
    store = Store(tmp_path)
    made = TOKENIZE(store, TokenizeConfig(shard_tokens=700), corpus=corpus, tokenizer=tokenizer)
    shard = made.path("train-00001.bin")
    content = bytearray(shard.read_bytes())
    content[10] ^= 4
    shard.write_bytes(content)
    names = frozenset(item.name for item in made.manifest.files)
    stream = TokenStream(store.open(made.id, lazy=names), "train")  # sizes fit, so opening sees nothing
    stream.read(0, 100)
    with pytest.raises(Corrupt, match=r"train-00001\.bin: block 0 "):
        stream.read(0, len(stream))
    with pytest.raises(Corrupt, match=r"train-00001\.bin: block 0 "):
        store.open(made.id)


def test_a_tokenizer_without_document_marks_is_refused(tmp_path: Path, make, corpus, tokenizer):
    files = {"tokenizer.json": tokenizer.path("tokenizer.json").read_bytes(), "tokenizer_config.json": b'{"eos_token": "<|eos|>"}'}
    without_bos = make(Store(tmp_path / "a"), files, kind="tokenizer")
    with pytest.raises(UnsupportedModel, match="names no bos_token or no eos_token"):
        TOKENIZE(Store(tmp_path / "b"), TokenizeConfig(), corpus=corpus, tokenizer=without_bos)
