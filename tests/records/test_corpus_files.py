"""A corpus comes back as it was written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.errors import SourceError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.records import corpus as corpus_files
from lineshaft.records.corpus import Document, read_corpus, write_corpus

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["\x00", "e\u0301", "\U0001f600", "行\r\n", "\ufeff", " "]
)
DOCUMENTS = st.lists(st.builds(Document, id=TEXT, source=TEXT, split=st.sampled_from(["train", "heldout"]), text=TEXT), max_size=12)


def written(folder: Path, documents: list[Document]) -> Artifact:
    store = Store(folder)
    with store.draft("corpus", stage="s", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        write_corpus(draft, iter(documents))
    (made,) = store.all()
    return store.open(made.id)


@settings(max_examples=25)
@given(DOCUMENTS)
def test_documents_come_back_in_order_whatever_their_text(documents: list[Document]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = written(Path(folder), documents)
        assert list(read_corpus(corpus)) == documents
        assert list(read_corpus(corpus, "heldout")) == [item for item in documents if item.split == "heldout"]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9, 25])
def test_borders_of_groups_and_files_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(corpus_files, "ROWS_A_GROUP", 4)
    monkeypatch.setattr(corpus_files, "ROWS_A_FILE", 8)
    documents = [Document(f"{number:016x}", "s", "train", str(number)) for number in range(count)]
    corpus = written(tmp_path, documents)
    assert list(read_corpus(corpus)) == documents
    assert [item.name for item in corpus.manifest.files] == [f"documents-{number:05d}.parquet" for number in range(-(-count // 8))]


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    documents = [Document("a", "b", "train", "文字" * 1000)] * 3
    assert written(tmp_path / "1", documents).manifest.digest == written(tmp_path / "2", documents).manifest.digest


@pytest.mark.parametrize("field", ["id", "source", "text"])
def test_half_a_surrogate_pair_is_refused_naming_the_document(tmp_path: Path, field: str) -> None:
    fields: dict[str, Any] = {"id": "0123", "source": "page.html", "split": "train", "text": "fine"}
    bad = Document(**{**fields, field: fields[field] + "\udc80"})
    with pytest.raises(SourceError, match=r"page\.html.*0123.*surrogate"):
        written(tmp_path, [Document(**fields), bad])
    assert not list(Store(tmp_path).all())


def test_documents_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "ROWS_A_GROUP", 2)
    store = Store(tmp_path)
    with store.draft("corpus", stage="s", version=1, config={}) as draft:
        assert isinstance(draft, Draft)

        def documents() -> Any:
            for number in range(6):
                assert number < 2 or (draft.root / "documents-00000.parquet").exists()
                yield Document(str(number), "s", "train", "t")

        write_corpus(draft, documents())
    (made,) = store.all()
    reading = read_corpus(store.open(made.id))
    assert next(reading).id == "0"
    reading.close()
