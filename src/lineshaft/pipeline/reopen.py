"""Finding again what was made before. Free of torch: `lineshaft serve` looks its checkpoint up here."""

from __future__ import annotations

from pathlib import Path

from lineshaft.base.errors import NotFound
from lineshaft.base.store import Artifact, Store

LARGE = (".parquet", ".bin", ".starts", ".safetensors")
"""Payload files that a run itself never reads."""


def looked_up(folder: Path, name: str, missing: str) -> Artifact:
    """The artifact of this reference or id in the store in `folder`. `missing`: what `name` was not, for whoever meant a path.

    Raises NotFound, Corrupt (see `reopened`).
    """
    if not folder.is_dir():
        raise NotFound(f'"{name}": no {missing}, and there is no store at {folder} to look it up in (name one with --store)')
    store = Store(folder)
    found = reopened(store, store.resolve(name))
    if found is None:
        raise NotFound(f"{name}: points to {store.resolve(name)}, which is no longer in {store.root}")
    return found


def reopened(store: Store, artifact_id: str) -> Artifact | None:
    """The finished artifact, or None. Raises Corrupt when a file that a run looks into by itself is damaged.

    Documents, tokens and weights may be terabytes and are only looked at by their size: stages and the server check them
    before they work from them.
    """
    found = store.find(artifact_id)
    if found is None:
        return None
    names = [item.name for item in [*found.manifest.files, *found.manifest.aside_files]]
    return store.open(artifact_id, lazy=frozenset(name for name in names if name.endswith(LARGE)))
