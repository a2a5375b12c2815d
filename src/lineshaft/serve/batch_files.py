"""The files of a batch: requests in, and answers kept so that a run killed at any moment can go on.

Answers are appended to OUT.part as they come. OUT itself appears at the end only, whole and in the order of the input.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from lineshaft.base.errors import ConfigError, SourceError
from lineshaft.base.files import full_disk_told, sync_folder

SYNC_SECONDS = 1.0
"""Answers that a failing machine (not process) may cost."""
_COMPLAINTS = 10
"""Bad lines that are told at once."""


class BatchRequest(Struct, forbid_unknown_fields=True):
    """A line of the input, in OpenAI's format."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    body: msgspec.Raw


@dataclass(frozen=True)
class Line:
    """Where a request stands in the input."""

    custom_id: str
    first: int
    """Byte of its line's beginning."""
    size: int


@dataclass(frozen=True)
class Requests:
    """A checked input file."""

    path: Path
    lines: list[Line]
    sha256: str

    def read(self, line: Line) -> BatchRequest:
        """The request of one line. Raises SourceError when the file was changed meanwhile."""
        with self.path.open("rb") as file:
            file.seek(line.first)
            try:
                request = msgspec.json.decode(file.read(line.size), type=BatchRequest)
            except msgspec.DecodeError:
                raise SourceError(f"{self.path}: was changed while it was being answered: run it again") from None
        return request


def read_requests(path: Path) -> Requests:
    """Check every line. Raises SourceError that names the bad ones by their numbers."""
    lines: list[Line] = []
    seen: dict[str, int] = {}
    sha, first, complaints = hashlib.sha256(), 0, list[str]()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                sha.update(raw)
                if raw.strip():
                    told, name = _checked(raw)
                    if name and name in seen:
                        told = f'custom_id "{name}" stands in line {seen[name]} already'
                    if told:
                        complaints.append(f"{path}: line {number}: {told}")
                    seen.setdefault(name, number)
                    lines.append(Line(name, first, len(raw)))
                first += len(raw)
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror}") from None
    if complaints:
        more = len(complaints) - _COMPLAINTS
        raise SourceError("\n".join(complaints[:_COMPLAINTS] + ([f"and {more} more"] if more > 0 else [])))
    if not lines:
        raise SourceError(f"{path}: holds no request: write one JSON object on each line")
    return Requests(path, lines, sha.hexdigest())


def _checked(raw: bytes) -> tuple[str, str]:
    """What is wrong with a line ("" for nothing), and its custom_id."""
    try:
        request = msgspec.json.decode(raw, type=BatchRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return str(error), ""
    if not bytes(request.body).lstrip().startswith(b"{"):
        return "`body` must be a JSON object", request.custom_id
    return "", request.custom_id


class _Header(Struct, forbid_unknown_fields=True):
    """First line of OUT.part: what its answers belong to."""

    input_sha256: str
    model: str


class _Named(Struct):
    """The part of an answer's line that says whose it is."""

    custom_id: str


@dataclass
class Journal:
    """The answers kept so far. Made by `journal`."""

    path: Path
    handle: int
    size: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    """custom_id to the first byte and the size of its line."""
    synced: float = 0.0

    def add(self, custom_id: str, answer: bytes) -> None:
        """Keep an answer, which is one line without its end."""
        self._append(answer + b"\n")
        self.kept[custom_id] = self.size - len(answer) - 1, len(answer) + 1
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make sure that what was kept outlasts the machine."""
        os.fsync(self.handle)
        self.synced = time.monotonic()

    def publish(self, order: Sequence[Line], target: Path) -> None:
        """Write `target`, whole and in order, and forget the journal."""
        whole = target.with_name(f".{target.name}.whole")
        with full_disk_told(target):
            with whole.open("wb") as file:
                for line in order:
                    first, size = self.kept[line.custom_id]
                    file.write(os.pread(self.handle, size, first))
                file.flush()
                os.fsync(file.fileno())
            whole.replace(target)
        sync_folder(target.parent)
        self.path.unlink()  # a run killed before this finds all answers kept, and publishes them once more

    def take_up(self, header: bytes) -> bool:
        """Find out what an earlier run kept; a line that it did not finish is cut off. False when it belongs to something else."""
        with self.path.open("rb") as file:
            begun = file.readline()
            if begun.endswith(b"\n") and begun != header:
                return False
            if begun == header:
                self.size = len(begun)
                self._take_lines(file)
        os.ftruncate(self.handle, self.size)
        if not self.size:
            self._append(header)
            self.sync()
        return True

    def _take_lines(self, lines: Iterator[bytes]) -> None:
        for line in lines:
            try:
                name = msgspec.json.decode(line, type=_Named).custom_id
            except (msgspec.DecodeError, UnicodeDecodeError):
                return
            if not line.endswith(b"\n"):
                return
            self.kept[name] = self.size, len(line)
            self.size += len(line)

    def _append(self, line: bytes) -> None:
        with full_disk_told(self.path):
            written = 0
            while written < len(line):
                written += os.write(self.handle, line[written:])
        self.size += len(line)


@contextmanager
def journal(target: Path, requests: Requests, model: str) -> Iterator[Journal]:
    """The journal of `target`, taken up where an earlier run left it. Raises ConfigError when it belongs to something else."""
    path = target.with_name(f"{target.name}.part")
    if target.exists() and not path.exists():
        raise ConfigError(f"{target}: exists already: remove it, or name another file for the answers")
    header = msgspec.json.encode(_Header(requests.sha256, model)) + b"\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another run is writing it: wait for that run") from None
        kept = Journal(path, handle)
        if not kept.take_up(header):
            raise ConfigError(
                f"{path}: was begun with another input than {requests.path} is now, or another model than {model}: "
                "go on with those, or remove it to begin anew"
            )
        if target.exists() and not all(line.custom_id in kept.kept for line in requests.lines):
            raise ConfigError(f"{target}: exists already, though {path} is not complete: remove one of them")
        yield kept
    finally:
        os.fsync(handle)
        os.close(handle)
