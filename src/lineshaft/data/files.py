"""A file or a folder as a source of documents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lineshaft.base.errors import SourceError
from lineshaft.base.files import digest
from lineshaft.base.terminal import say
from lineshaft.data.formats import READERS, Job
from lineshaft.data.raw import Noticed, Raw

SUPPORTED = ", ".join(READERS)


class Files:
    """The readable files of a folder, or one file. Hidden files and folders are left alone."""

    def __init__(self, source: str, text_column: str | None) -> None:
        """Raises SourceError when there is nothing to read."""
        self._text_column = text_column
        self._root, names = _look(Path(source).expanduser())
        self._names = [name for name in names if _kind(name) in READERS]
        self.skipped = Counter(_kind(name) or "no extension" for name in names if _kind(name) not in READERS)
        """Files of kinds that can't be read, by extension."""
        if not self._names:
            others = f"; it has {_counted(self.skipped)}" if self.skipped else ""
            raise SourceError(f"{source}: nothing to read here{others}. Supported: {SUPPORTED}")
        self.name = self._names[0] if len(self._names) == 1 else f"{len(self._names)} files"

    def digest(self) -> str:
        """SHA-256 over relative names and content."""
        content = [[name, _sha256(self._root / name)] for name in self._names]
        return digest({"kind": "files", "files": content, "skipped": dict(self.skipped)})

    def read(self, noticed: Noticed) -> Iterator[Raw]:
        """The documents, file by file in the order of names. Raises SourceError for a file that can't be read."""
        if self.skipped:
            say(f"skipped {_counted(self.skipped)}: supported are {SUPPORTED}")
        for name in self._names:
            yield from READERS[_kind(name)](Job(self._root / name, name, self._text_column, noticed))


def _look(path: Path) -> tuple[Path, list[str]]:
    """The folder to read from and the names in it, sorted, relative, with forward slashes."""
    if path.is_file():
        if _kind(path.name) not in READERS:
            raise SourceError(f"{path}: files of this kind can't be read; supported: {SUPPORTED}")
        return path.parent, [path.name]
    if not path.is_dir():
        raise SourceError(f'{path}: no such file or folder (data.source is a path, or "stdlib")')
    found = (item.relative_to(path) for item in path.rglob("*") if item.is_file())
    names = sorted(item.as_posix() for item in found if not any(part.startswith(".") for part in item.parts))
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise SourceError(f"{path}: the file name {name!r} is not UTF-8; rename it")
    return path, names


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{path}: can't be read ({error.strerror})") from None
