"""The manifest: what an artifact is, what it was made from, and what its bytes must be.

Written last, so its presence means that the folder is complete. Two parts: what was made (hashed into `digest`,
equal for equal runs) and what was noticed while making it (`aside`: time, machine, measured speed; never in `digest`).
`seal` covers both, so a flipped bit in the manifest itself is found as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from lineshaft.base.config import Config, load
from lineshaft.base.errors import ConfigError, Corrupt, NotFound, StoreError
from lineshaft.base.files import REMEDY, FileRecord, canonical, check_size, digest, verify, write_atomic

FILE_NAME = "manifest.json"
Kind = Literal["corpus", "tokenizer", "tokens", "checkpoint", "report", "traffic"]


class Manifest(Config):
    """What one artifact is."""

    format: Literal[1] = 1
    """Version of this layout."""
    id: str
    """Kind and the first 16 hex digits of `key`."""
    kind: Kind
    stage: str
    """Name of the stage that made it."""
    version: int
    """Version of that stage's code: raised when the same config would give other bytes."""
    key: str
    """SHA-256 of (stage, version, config, inputs, parents): known before the work is done, so it serves as cache key."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Content digests of what came from outside the store, such as raw files."""
    parents: dict[str, str]
    """Role to artifact id."""
    facts: dict[str, Any]
    """What the stage wants known about the result; part of `digest`."""
    files: list[FileRecord]
    digest: str
    """SHA-256 over all the fields above: equal digests mean equal artifacts."""
    aside: dict[str, Any]
    """When, where and how fast: true of this run only."""
    aside_files: list[FileRecord]
    """Files that hold measurements: checked on load like the others, not part of `digest`."""
    seal: str
    """SHA-256 over everything else in this file."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        if self.id != id_of(self.kind, self.key):
            raise ValueError(f'the id "{self.id}" does not belong to its key')
        names = [item.name for item in (*self.files, *self.aside_files)]
        if len(set(names)) != len(names) or FILE_NAME in names:
            raise ValueError("a file is listed twice, or the manifest lists itself")
        return self


def id_of(kind: Kind, key: str) -> str:
    """The artifact id: kind and the first 16 hex digits of the key."""
    return f"{kind}-{key[:16]}"


def key_of(stage: str, version: int, config: dict[str, Any], inputs: dict[str, str], parents: dict[str, str]) -> str:
    """The cache key of a stage's result."""
    return digest({"stage": stage, "version": version, "config": config, "inputs": inputs, "parents": parents})


def write(root: Path, fields: dict[str, Any], aside: dict[str, Any], files: list[FileRecord], aside_files: list[FileRecord]) -> Manifest:
    """Complete `fields` with file records, digest and seal, and write the manifest into `root`."""
    content = {"format": 1, **fields, "files": [item.model_dump() for item in files]}
    content["digest"] = digest(content)
    content |= {"aside": aside, "aside_files": [item.model_dump() for item in aside_files]}
    content["seal"] = digest(content)
    manifest = load(Manifest, content, where=FILE_NAME)
    write_atomic(root / FILE_NAME, _rendered(content))
    return manifest


def _rendered(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read(root: Path) -> Manifest:
    """The manifest in `root`. Raises NotFound when there is none, Corrupt when it is not what was written."""
    path = root / FILE_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{root}: no artifact here (it has no {FILE_NAME})") from None
    except OSError as error:
        raise Corrupt(f"{path}: block 0 can't be read: {error.strerror}; {REMEDY}") from error
    try:
        content = json.loads(raw)
        if _rendered(content) != raw:  # 1e-05 and 1E-05 are one bit apart and mean the same, so the seal alone would not tell
            raise ValueError("it is not written the way manifests are")
        sealed = dict(content)
        seal = sealed.pop("seal")
        if digest(sealed) != seal:
            raise ValueError("its content does not match its seal")
        return load(Manifest, content, where=FILE_NAME)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError, StoreError) as error:
        raise Corrupt(f"{path}: block 0 is damaged ({error}); {REMEDY}") from None


def check_files(root: Path, manifest: Manifest, *, lazy: frozenset[str] = frozenset()) -> None:
    """Read every file of the artifact against its record; of those in `lazy` only the size (their readers check blocks)."""
    listed = [*manifest.files, *manifest.aside_files]
    for item in listed:
        if item.name in lazy:
            check_size(root, item)
        else:
            verify(root, item)
    _refuse_unlisted(root, {FILE_NAME, *(item.name for item in listed)})


def _refuse_unlisted(root: Path, listed: set[str]) -> None:
    """Readers go by name patterns (`documents-*.parquet`, `model-*.safetensors`) and would take any such file for ours.

    Hidden entries (.nfs0001, .DS_Store) are let be: systems drop them anywhere, and no reader of ours looks at them.
    """
    for path in sorted(root.rglob("*")):
        name, folder = path.relative_to(root), path.is_dir() and not path.is_symlink()
        if not folder and name.as_posix() not in listed and not any(part.startswith(".") for part in name.parts):
            raise Corrupt(f"{path}: no block of it is in the manifest: it was put there later; move it out of the artifact")


def content_fields(manifest: Manifest) -> bytes:
    """The canonical bytes that `digest` is taken of; for tests and for people who want to check by hand."""
    return canonical(manifest.model_dump(exclude={"digest", "aside", "aside_files", "seal"}))
