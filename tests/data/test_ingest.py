"""The whole way from raw documents to a corpus: counts, reasons, splits, keys, and errors that leave nothing behind."""

import hashlib
import json
from pathlib import Path

import pytest

from lineshaft.base.errors import ConfigError, SourceError
from lineshaft.base.store import Store
from lineshaft.data.ingest import INGEST, IngestConfig, Tally, sift
from lineshaft.data.raw import Raw
from lineshaft.records.corpus import read_corpus

LONG = "one two three four five six seven eight nine ten"


def sifted(*texts: str, share: float = 0.5) -> tuple[list[str], Tally]:
    tally = Tally()
    raws = (Raw(f"x#{number}", text) for number, text in enumerate(texts))
    return [document.text for document in sift(raws, IngestConfig(heldout_share=share), tally)], tally


def lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbered(count: int) -> list[str]:
    return [f"{LONG}, and this is number {number}" for number in range(count)]


def test_every_drop_has_a_reason_and_is_counted():
    kept, tally = sifted(LONG, "too short", LONG.upper(), "ha ha " * 20, f"<p>cafÃ©</p> {LONG}")
    assert kept == [LONG, f"café\n {LONG}\n"] or kept == [LONG, f"café\n {LONG}"]
    assert (tally.read, tally.kept) == (5, 2)
    assert tally.reasons() == {"too_few_words": 1, "few_letters": 0, "repetitive": 1, "long_words": 0, "duplicate": 1}
    assert tally.changed["mojibake"] == tally.changed["markup"] == 1


def test_rules_see_the_cleaned_text():
    kept, tally = sifted("<b>one</b> <i>two</i> " + "<br>" * 20)
    assert (kept, tally.dropped) == ([], {"too_few_words": 1})


def test_a_defect_of_the_reader_is_a_reason():
    tally = Tally()
    assert list(sift(iter([Raw("a#0", "", "malformed_json")]), IngestConfig(), tally)) == []
    assert list(tally.reasons().items())[-1] == ("malformed_json", 1)


def test_a_document_is_named_and_split_by_the_hash_of_its_text(corpus):
    for document in read_corpus(corpus):
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        assert document.id == digest[:16]
        assert document.split == ("heldout" if int(digest, 16) / 2**256 < 0.1 else "train")


def test_the_facts_say_what_happened(corpus):
    facts = corpus.manifest.facts
    documents = list(read_corpus(corpus))
    assert (facts["source"], facts["encodings"], facts["text_columns"]) == ("notes.jsonl", {"utf-8": 1}, {"text": 1})
    assert facts["kept"] == len(documents) == facts["read"] - sum(facts["dropped"].values())
    assert facts["valid_share"] == round(facts["kept"] / facts["read"], 6)
    for split, counts in facts["splits"].items():
        part = [document.text for document in read_corpus(corpus, split)]
        assert counts == {"documents": len(part), "bytes": sum(len(text.encode()) for text in part), "characters": sum(map(len, part))}


def test_two_stores_give_equal_digests_wherever_the_files_lie(tmp_path: Path, corpus, jsonl: Path):
    elsewhere = tmp_path / "elsewhere" / "notes.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(jsonl.read_bytes())
    again = INGEST(Store(tmp_path / "store"), IngestConfig(source=str(elsewhere), heldout_share=0.1))
    assert (again.id, again.manifest.digest) == (corpus.id, corpus.manifest.digest)


def test_nothing_hashed_holds_a_path_of_this_machine(corpus, jsonl: Path):
    manifest = corpus.manifest
    assert str(jsonl.parent) not in json.dumps([manifest.config, manifest.inputs, manifest.facts])
    assert all(document.source.startswith("notes.jsonl#") for document in read_corpus(corpus))
    assert manifest.aside["config"] == {"source": str(jsonl)}


def test_other_content_or_other_rules_ask_for_another_corpus(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", *numbered(3))
    first = INGEST.request(IngestConfig(source=str(path))).id
    assert first == INGEST.request(IngestConfig(source=str(path))).id
    assert first != INGEST.request(IngestConfig(source=str(path), text_column="text")).id
    lines(path, *numbered(4))
    assert first != INGEST.request(IngestConfig(source=str(path))).id


def test_the_two_kinds_of_source_never_agree(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", *numbered(3))
    assert INGEST.request(IngestConfig(source="stdlib")).id != INGEST.request(IngestConfig(source=str(path))).id


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "a.jsonl: has no documents"),
        (["short", "shorter", "ha ha " * 20], r"3 documents read, none kept \(too_few_words 2, repetitive 1\)"),
        (numbered(1), r"1 documents kept and none of them fell into the heldout part; give more text or raise data\.heldout_share"),
    ],
)
def test_a_source_without_usable_text_is_refused_and_leaves_nothing(tmp_path: Path, texts: list[str], message: str):
    path = lines(tmp_path / "raw" / "a.jsonl", *texts)
    store = Store(tmp_path / "store")
    with pytest.raises(SourceError, match=message):
        INGEST(store, IngestConfig(source=str(path)))
    assert list(store.all()) == []
    assert not list((store.root / "work").rglob("*.parquet"))


def test_an_empty_training_part_asks_for_a_smaller_share(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", *numbered(1))
    with pytest.raises(SourceError, match=r"fell into the train part; give more text or lower"):
        INGEST(Store(tmp_path / "store"), IngestConfig(source=str(path), heldout_share=0.999999))


def test_a_missing_source_is_told_before_anything_is_made(tmp_path: Path):
    with pytest.raises(SourceError, match="no such file or folder"):
        INGEST(Store(tmp_path / "store"), IngestConfig(source=str(tmp_path / "nowhere")))


def test_a_corpus_is_no_tokenizer(store: Store, corpus):
    from lineshaft.data.tokens import TOKENIZE, TokenizeConfig

    with pytest.raises(ConfigError, match="tokenizer must be a tokenizer"):
        TOKENIZE(store, TokenizeConfig(), corpus=corpus, tokenizer=corpus)
