"""Every format comes back as it was written; what can't be read is said, not guessed."""

import codecs
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.errors import SourceError
from lineshaft.data.files import Files
from lineshaft.data.pieces import PIECE_CHARACTERS, pieces
from lineshaft.data.raw import Noticed, Raw

WEIRD = st.text(alphabet=st.characters(codec="utf-8"))
TEXTS = st.lists(WEIRD, max_size=20).map(lambda texts: ["a text that makes this the longest column", *texts])


def read(path: Path, column: str | None = None) -> tuple[list[Raw], Noticed]:
    noticed = Noticed()
    return list(Files(str(path), column).read(noticed)), noticed


def texts(path: Path, column: str | None = None) -> list[str]:
    return [raw.text for raw in read(path, column)[0]]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@settings(max_examples=40)
@given(written=TEXTS)
def test_jsonl_comes_back(scratch: Path, written: list[str]):
    path = write(scratch / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in written))
    assert texts(path) == written


@settings(max_examples=40)
@given(written=TEXTS)
def test_jsonl_with_raw_unicode_comes_back(scratch: Path, written: list[str]):
    path = write(scratch / "b.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in written))
    assert texts(path) == written


@settings(max_examples=40)
@given(written=TEXTS)
def test_csv_comes_back(scratch: Path, written: list[str]):
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["label", "text"], *[["1", text] for text in written]])
    assert texts(write(scratch / "a.csv", file.getvalue())) == written


@settings(max_examples=40)
@given(written=TEXTS)
def test_parquet_comes_back(scratch: Path, written: list[str]):
    pq.write_table(pa.table({"n": list(range(len(written))), "text": written}), scratch / "a.parquet", row_group_size=3)
    assert texts(scratch / "a.parquet") == written


@given(written=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r"), min_size=1))
def test_text_comes_back(scratch: Path, written: str):
    assert "".join(texts(write(scratch / "a.txt", codecs.BOM_UTF8 + written.encode()))) == written


@given(st.lists(st.text(alphabet="ab\n "), max_size=30))
def test_pieces_lose_nothing(lines: list[str]):
    assert "".join(pieces(lines)) == "".join(lines)


def test_a_book_is_cut_at_blank_lines(tmp_path: Path):
    book = "\n".join(f"Paragraph {n} has a few words to say.\n" for n in range(1000))
    found = texts(write(tmp_path / "book.md", book))
    assert "".join(found) == book
    assert len(found) > 3
    assert all(part.startswith("Paragraph") and len(part) < 2 * PIECE_CHARACTERS for part in found)


def test_one_endless_line_is_cut_too(tmp_path: Path):
    found = texts(write(tmp_path / "line.txt", "x" * (5 * PIECE_CHARACTERS)))
    assert max(map(len, found)) <= 3 * PIECE_CHARACTERS
    assert len("".join(found)) == 5 * PIECE_CHARACTERS


@pytest.mark.parametrize("content", ["text,label\n很好的味道,1\n", "text\tlabel\n很好的味道\t1\n", "text;label\n很好的味道;1\n"])
@pytest.mark.parametrize(("encoding", "said"), [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("gb18030", "gb18030"), ("gbk", "gb18030")])
def test_encodings_and_delimiters(tmp_path: Path, content: str, encoding: str, said: str):
    raws, noticed = read(write(tmp_path / "a.csv", content.encode(encoding)))
    assert raws == [Raw("a.csv#0", "很好的味道")]
    assert noticed.encodings == {said: 1}


def test_gb18030_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    read(write(tmp_path / "a.txt", "中文".encode("gb18030")))
    assert "read as GB18030" in capsys.readouterr().err


def test_a_character_split_between_two_chunks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lineshaft.data.formats.CHUNK_BYTES", 2)
    assert texts(write(tmp_path / "a.txt", "a中文b")) == ["a中文b"]
    with pytest.raises(SourceError, match=r"byte 4 is wrong"):
        read(write(tmp_path / "b.txt", b"a\xe4\xb8\xad\xff\xff"))


def test_bytes_of_neither_encoding_are_refused(tmp_path: Path):
    with pytest.raises(SourceError, match=r"a\.txt: neither UTF-8 \(byte 3 is wrong\) nor GB18030.*iconv"):
        read(write(tmp_path / "a.txt", b"abc\xff\xfe"))


def test_a_cut_last_character_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="byte 3 is wrong"):
        read(write(tmp_path / "a.txt", b"abc\xe4"))


def test_the_usual_column_is_guessed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    raws, noticed = read(write(tmp_path / "r.csv", "url,Review,label\nhttp://a.very/long/link/to/somewhere,很好,1\n"))
    assert raws[0].text == "很好"
    assert noticed.text_columns == {"Review": 1}
    assert 'r.csv: reading the column "Review" (guessed' in capsys.readouterr().err


def test_the_longest_column_is_guessed_when_no_name_is_usual(tmp_path: Path):
    assert texts(write(tmp_path / "r.csv", "n,what,who\n123456789012345,a long enough note,me\n")) == ["a long enough note"]


def test_a_named_column_is_taken_and_a_wrong_one_gets_a_suggestion(tmp_path: Path):
    path = write(tmp_path / "r.csv", "text,reply\nlong question,short\n")
    assert texts(path, "reply") == ["short"]
    with pytest.raises(SourceError, match=r'r\.csv: no column "replly"; did you mean "reply"\? columns: "text", "reply"'):
        read(path, "replly")


@pytest.mark.parametrize("name", ["n.csv", "n.jsonl", "n.parquet"])
def test_a_table_without_text_is_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"n": [1, 2]}), path)
    else:
        write(path, "n,m\n1,2\n" if name.endswith("csv") else '{"n": 1}\n')
    with pytest.raises(SourceError, match="no column holds text"):
        read(path)


def test_malformed_lines_are_defects_not_crashes(tmp_path: Path):
    lines = ['{"text": "good"}', "{broken", '["list"]', "", '{"text": null}', '{"other": "x"}', "[" * 100_000, '{"text": "also good"}']
    raws, _ = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [raw.defect or raw.text for raw in raws] == [
        "good",
        "malformed_json",
        "malformed_json",
        "no_text",
        "no_text",
        "malformed_json",
        "also good",
    ]


def test_malformed_lines_after_the_sample_are_defects_too(tmp_path: Path):
    raws, _ = read(write(tmp_path / "a.jsonl", '{"text": "good"}\n' * 300 + "{\n"))
    assert raws[-1] == Raw("a.jsonl#300", "", "malformed_json")


def test_a_csv_row_of_another_width_is_a_defect(tmp_path: Path):
    raws, _ = read(write(tmp_path / "a.csv", "text,n\ngood,1\nlonely\n\none,2,3\n"))
    assert [raw.defect or raw.text for raw in raws] == ["good", "malformed_row", "malformed_row"]


def test_a_field_larger_than_the_csv_modules_limit_is_read(tmp_path: Path):
    assert len(texts(write(tmp_path / "a.csv", "text,n\n" + "x" * 300_000 + ",1\n"))[0]) == 300_000


def test_parquet_strings_of_every_kind_are_read(tmp_path: Path):
    values = ["word", None, "字"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"t": pa.array(values).cast(kind)}), tmp_path / "a.parquet")
        assert [raw.defect or raw.text for raw in read(tmp_path / "a.parquet")[0]] == ["word", "no_text", "字"]


def test_damaged_parquet_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n} of many" for n in range(1000)]}), path, compression="zstd")
    whole = path.read_bytes()
    damaged = {"cut": whole[:-9], "empty": b"", "foreign": b"PK" * 100, "page": whole[:40] + bytes(60) + whole[100:]}
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"a\.parquet: can't be read as Parquet"):
            read(path)


def test_a_folder_is_read_in_the_order_of_names_and_says_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("b.txt", "a/z.md", "a/c.txt", "photo.PNG", "README", ".git/config.txt", "a/.hidden.md"):
        write(tmp_path / "raw" / name, f"text of {name}")
    found = Files(str(tmp_path / "raw"), None)
    assert [raw.source for raw in found.read(Noticed())] == ["a/c.txt#0", "a/z.md#0", "b.txt#0"]
    assert found.skipped == {".png": 1, "no extension": 1}
    assert "skipped 1 x .png, 1 x no extension" in capsys.readouterr().err


def test_empty_files_beside_full_ones_do_no_harm(tmp_path: Path):
    for name in ("a.csv", "b.jsonl", "c.txt"):
        write(tmp_path / name, "")
    write(tmp_path / "d.csv", "text,n\n")
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    write(tmp_path / "f.txt", "here")
    assert texts(tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such file or folder"),
        ("empty", "nothing to read here. Supported"),
        ("photos", "it has 1 x .png"),
        ("doc.pdf", "files of this kind"),
    ],
)
def test_a_source_that_cannot_be_read_says_so(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "photos" / "a.png", "x")
    write(tmp_path / "doc.pdf", "x")
    with pytest.raises(SourceError, match=message):
        Files(str(tmp_path / name), None)


def test_digests_follow_names_content_and_what_is_skipped(tmp_path: Path):
    write(tmp_path / "one" / "a.txt", "text")
    write(tmp_path / "same" / "a.txt", "text")
    write(tmp_path / "renamed" / "b.txt", "text")
    write(tmp_path / "changed" / "a.txt", "texts")
    write(tmp_path / "more" / "a.txt", "text")
    write(tmp_path / "more" / "c.png", "text")
    digests = {name: Files(str(tmp_path / name), None).digest() for name in ("one", "same", "renamed", "changed", "more")}
    assert digests["one"] == digests["same"] == Files(str(tmp_path / "one" / "a.txt"), None).digest()
    assert len(set(digests.values())) == 4
