"""The artifact store: one folder for each artifact, named by what it was made from, whole or absent.

    <store>/artifacts/<id>/    manifest.json and the payload
    <store>/work/<id>/         a draft in the making; may hold resumable state; never loadable
    <store>/refs/<name>        a name such as `prod`, holding an artifact id
    <store>/locks/<id>         held while a draft is being made

A draft is built in `work`, hashed, given its manifest last and renamed into `artifacts` in one step, so that `kill -9`
at any moment leaves a whole artifact or none. Two runs that want the same artifact take turns on its lock; the second
finds the work done. Runs that want different artifacts never meet.
"""

from __future__ import annotations

import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lineshaft.base import files, manifest
from lineshaft.base.errors import ConfigError, Corrupt, NotFound, StoreError
from lineshaft.base.lock import locked
from lineshaft.base.manifest import Kind, Manifest

_ID = re.compile(rf"({'|'.join(get_args(Kind))})-[0-9a-f]{{16}}")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk, its manifest checked; `Store.open` and `Store.check` check its bytes as well."""

    root: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """Kind and key, such as `tokens-0123456789abcdef`."""
        return self.manifest.id

    def path(self, name: str) -> Path:
        """Where the payload file `name` lies."""
        return self.root / name


@dataclass
class Draft:
    """An artifact in the making. Write payload files below `root`; they are hashed when the draft is finished."""

    root: Path
    """Folder of the payload. A run that was killed left its files here: overwrite them, or resume from `scratch`."""
    parents: Mapping[str, Artifact] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What to remember of the result; equal runs must give equal facts."""
    aside: dict[str, Any] = field(default_factory=dict)
    """Measurements of this run: times, speeds, machine."""
    aside_files: set[str] = field(default_factory=set)
    """Payload files that hold measurements and so stay out of the digest."""

    @property
    def scratch(self) -> Path:
        """A folder for resumable state; it survives a crash and is deleted when the draft is finished."""
        folder = self.root.parent / "scratch"
        folder.mkdir(exist_ok=True)
        return folder


class Store:
    """Artifacts and references below one folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        try:
            for part in ("artifacts", "work", "refs", "locks"):
                with files.full_disk_told(self.root):
                    (self.root / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.root}: can't hold a store: {error.strerror}; name another folder with --store") from error

    # -- reading ------------------------------------------------------------------------------------------------

    def find(self, artifact_id: str) -> Artifact | None:
        """The artifact of this id, its manifest checked and its files present, or None when it was never finished.

        The files' bytes are not read: `check` does that before something is built from them.
        """
        root = self.root / "artifacts" / artifact_id
        return self._opened(root, lazy=None) if _ID.fullmatch(artifact_id) and root.exists() else None

    def open(self, name: str, *, lazy: frozenset[str] = frozenset()) -> Artifact:
        """The artifact of this id or reference, every byte checked but for the files in `lazy`.

        Raises NotFound, or Corrupt naming the file and the block.
        """
        return self._opened(self.root / "artifacts" / self.resolve(name), lazy=lazy)

    def check(self, artifact: Artifact) -> None:
        """Read every byte of an artifact. Raises Corrupt naming the file and the block."""
        manifest.check_files(artifact.root, artifact.manifest)

    def _opened(self, root: Path, lazy: frozenset[str] | None) -> Artifact:
        found = self._manifest(root)
        everything = frozenset(item.name for item in [*found.files, *found.aside_files])
        manifest.check_files(root, found, lazy=everything if lazy is None else lazy)
        return Artifact(root, found)

    def _manifest(self, root: Path) -> Manifest:
        """The manifest of a folder below `artifacts`, which is renamed there whole: without one it was damaged."""
        try:
            found = manifest.read(root)
        except NotFound as error:
            if not root.exists():
                raise
            raise Corrupt(f"{error}: block 0 of it is gone; {files.REMEDY}") from None
        if found.id != root.name:
            told = f"block 0 names another artifact, {found.id}: folders were swapped"
            raise Corrupt(f"{root / manifest.FILE_NAME}: {told}; give each its own name back")
        return found

    def resolve(self, name: str) -> str:
        """The artifact id behind an id or a reference. Raises NotFound with what is there."""
        if _ID.fullmatch(name) and (self.root / "artifacts" / name).exists():
            return name
        if _REF.fullmatch(name) and (self.root / "refs" / name).exists():
            return self._target(name)
        refs = ", ".join(sorted(self.refs())) or "none yet"
        raise NotFound(f'"{name}": no artifact or reference of that name in {self.root} (references here: {refs})')

    def all(self) -> Iterator[Manifest]:
        """The manifests of all artifacts, in the order of their ids."""
        for root in sorted((self.root / "artifacts").iterdir()):
            if _ID.fullmatch(root.name):
                yield self._manifest(root)

    def children(self, artifact_id: str) -> list[Manifest]:
        """The artifacts made directly from this one."""
        return [item for item in self.all() if artifact_id in item.parents.values()]

    # -- references ---------------------------------------------------------------------------------------------

    def refs(self) -> dict[str, str]:
        """All references, name to artifact id."""
        return {path.name: self._target(path.name) for path in sorted((self.root / "refs").iterdir()) if _REF.fullmatch(path.name)}

    def _target(self, ref: str) -> str:
        path = self.root / "refs" / ref
        target = path.read_bytes().decode(errors="replace").strip()
        if not _ID.fullmatch(target):
            raise Corrupt(f"{path}: block 0 is damaged: a reference holds an artifact id, this one {target[:40]!r}; set it again")
        return target

    def set_ref(self, name: str, artifact_id: str) -> None:
        """Point `name` at an artifact that exists, given by its id or by another reference."""
        if not _REF.fullmatch(name) or _ID.fullmatch(name):
            raise ConfigError(f'"{name}": a reference is made of letters, digits, ".", "_" and "-", and is not an artifact id')
        files.write_atomic(self.root / "refs" / name, f"{self.resolve(artifact_id)}\n".encode())

    # -- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def draft(
        self,
        kind: Kind,
        *,
        stage: str,
        version: int,
        config: dict[str, Any],
        inputs: dict[str, str] | None = None,
        parents: Mapping[str, Artifact] | None = None,
    ) -> Iterator[Draft | Artifact]:
        """Make an artifact, or get the one that is there already.

        Yields an Artifact when an equal request was finished before (possibly by another process while this one waited),
        otherwise a Draft; on leaving without an error the draft becomes an artifact.
        """
        parent_ids = {role: parent.id for role, parent in (parents or {}).items()}
        key = manifest.key_of(stage, version, config, inputs or {}, parent_ids)
        artifact_id = manifest.id_of(kind, key)
        with files.full_disk_told(self.root), locked(self.root / "locks" / artifact_id):
            if ready := self.find(artifact_id):
                shutil.rmtree(self.root / "work" / artifact_id, ignore_errors=True)  # killed between the rename and the sweeping
                yield ready
                return
            with self._begun(artifact_id, parents or {}) as draft:
                aside = {"created_unix": time.time()}
                started = time.monotonic()
                yield draft
                fields = {"id": artifact_id, "kind": kind, "stage": stage, "version": version, "key": key, "config": config}
                fields |= {"inputs": inputs or {}, "parents": parent_ids, "facts": draft.facts}
                draft.aside |= aside | {"seconds": time.monotonic() - started}
                self._finish(draft, artifact_id, fields)

    @contextmanager
    def _begun(self, artifact_id: str, parents: Mapping[str, Artifact]) -> Iterator[Draft]:
        """An empty payload folder; when anything fails its space is given back, and only scratch stays to resume from."""
        payload = self.root / "work" / artifact_id / "payload"
        shutil.rmtree(payload, ignore_errors=True)  # left by a run that was killed
        payload.mkdir(parents=True)
        try:
            yield Draft(payload, parents)
        except BaseException:
            shutil.rmtree(payload, ignore_errors=True)
            with suppress(OSError):  # there is scratch
                payload.parent.rmdir()
            raise

    def _finish(self, draft: Draft, artifact_id: str, fields: dict[str, Any]) -> None:
        names = _payload_names(draft)
        records = [files.record(draft.root, name) for name in names]
        files.sync_tree(draft.root)
        manifest.write(
            draft.root,
            fields,
            draft.aside,
            [item for item in records if item.name not in draft.aside_files],
            [item for item in records if item.name in draft.aside_files],
        )
        draft.root.rename(self.root / "artifacts" / artifact_id)
        files.sync_folder(self.root / "artifacts")
        shutil.rmtree(self.root / "work" / artifact_id, ignore_errors=True)


def _payload_names(draft: Draft) -> list[str]:
    """Names of the payload's files, sorted. Raises StoreError for what an artifact can't hold."""
    names = []
    for path in sorted(draft.root.rglob("*")):
        mode, name = path.lstat().st_mode, path.relative_to(draft.root).as_posix()
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode) or name == manifest.FILE_NAME:
            raise StoreError(f"{name}: an artifact holds plain files, no links or devices, and {manifest.FILE_NAME} is the store's own")
        names.append(name)
    if missing := sorted(draft.aside_files.difference(names)):
        raise StoreError(f"{', '.join(missing)}: named in aside_files but not written")
    return sorted(names)
