"""Readers of single files: text, JSON Lines, CSV, Parquet. Each streams, so memory does not grow with the file.

Text is UTF-8 (with or without a byte-order mark), or else GB18030, which covers GBK and GB2312; nothing else is guessed.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lineshaft.base.errors import SourceError
from lineshaft.base.terminal import say
from lineshaft.data import columns
from lineshaft.data.pieces import PIECE_CHARACTERS, pieces
from lineshaft.data.raw import Noticed, Raw

CHUNK_BYTES = 1 << 20
DELIMITERS = (",", "\t", ";")
ROWS_A_BATCH = 1024


@dataclass(frozen=True)
class Job:
    """One file to read."""

    path: Path
    name: str
    """Path relative to the source, with forward slashes."""
    text_column: str | None
    """As configured; None means guess."""
    noticed: Noticed


def read_text(job: Job) -> Iterator[Raw]:
    """A text file as documents of about PIECE_CHARACTERS, cut at blank lines."""
    with job.path.open(encoding=_encoding(job)) as file:
        lines = iter(lambda: file.readline(PIECE_CHARACTERS), "")  # a file that is one endless line comes in parts, too
        for number, piece in enumerate(pieces(lines)):
            yield Raw(f"{job.name}#{number}", piece)


def read_jsonl(job: Job) -> Iterator[Raw]:
    """One object a line. A line that is none is handed on as a defect."""
    with job.path.open(encoding=_encoding(job)) as file:
        rows = (_json_object(line) for line in file if line.strip())
        sample = list(itertools.islice(rows, columns.SAMPLE_ROWS))
        objects = [row for row in sample if row is not None]
        names = list(dict.fromkeys(key for row in objects for key in row))
        column = _column(job, names, objects) if objects else ""
        for number, row in enumerate(itertools.chain(sample, rows)):
            source = f"{job.name}#{number}"
            yield Raw(source, "", "malformed_json") if row is None else _raw(source, row.get(column))


def read_csv(job: Job) -> Iterator[Raw]:
    """A table with a header line; fields may be of any size. Rows with more or fewer fields than the header are defects."""
    csv.field_size_limit(sys.maxsize)
    with job.path.open(encoding=_encoding(job), newline="") as file:
        delimiter = _delimiter(file.readline())
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        header = next(rows, [])
        filled = (row for row in rows if row)
        sample = list(itertools.islice(filled, columns.SAMPLE_ROWS))
        if not sample:
            return
        column = _column(job, header, [dict(zip(header, row, strict=False)) for row in sample])
        place = header.index(column)
        for number, row in enumerate(itertools.chain(sample, filled)):
            source = f"{job.name}#{number}"
            yield _raw(source, row[place]) if len(row) == len(header) else Raw(source, "", "malformed_row")


def read_parquet(job: Job) -> Iterator[Raw]:
    """One document a row, read in batches."""
    try:
        with pq.ParquetFile(job.path) as file:
            texts = [field.name for field in file.schema_arrow if _holds_text(field.type)]
            if not file.metadata.num_rows:
                return
            names = file.schema_arrow.names if job.text_column else texts
            first = next(file.iter_batches(columns.SAMPLE_ROWS, columns=texts), None) if texts else None
            column = _column(job, names, first.to_pylist() if first else [])
            batches = file.iter_batches(ROWS_A_BATCH, columns=[column])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values):
                yield _raw(f"{job.name}#{number}", value)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{job.name}: can't be read as Parquet ({str(error).splitlines()[0]}); restore the file") from None


READERS: Mapping[str, Callable[[Job], Iterator[Raw]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _raw(source: str, value: Any) -> Raw:
    return Raw(source, value) if isinstance(value, str) else Raw(source, "", "no_text")


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _holds_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))


def _delimiter(header: str) -> str:
    """A comma, unless the header has none but has another usual delimiter."""
    return next((mark for mark in DELIMITERS if mark in header), ",")


def _column(job: Job, names: list[str], sample: list[dict[str, Any]]) -> str:
    column, guessed = columns.pick(job.name, names, sample, job.text_column)
    if guessed:
        say(f'{job.name}: reading the column "{column}" (guessed; another can be named with text_column)')
    job.noticed.text_columns[column] += 1
    return column


def _encoding(job: Job) -> str:
    """The encoding in which the whole file is valid. Raises SourceError when neither is."""
    bad = _first_bad_byte(job.path, "utf-8")
    if bad is None:
        job.noticed.encodings["utf-8"] += 1
        return "utf-8-sig"  # takes a byte-order mark off, if there is one
    if _first_bad_byte(job.path, "gb18030") is not None:
        raise SourceError(f"{job.name}: neither UTF-8 (byte {bad} is wrong) nor GB18030; convert it to UTF-8, for example with `iconv`")
    job.noticed.encodings["gb18030"] += 1
    say(f"{job.name}: not UTF-8 (byte {bad} is wrong), read as GB18030")
    return "gb18030"


def _first_bad_byte(path: Path, encoding: str) -> int | None:
    decoder = codecs.getincrementaldecoder(encoding)()
    place = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return place - pending + error.start
            if not chunk:
                return None
            place += len(chunk)
