"""Finding again what was made before. Free of torch: `lineshaft serve` looks its checkpoint up here."""

from __future__ import annotations

from lineshaft.base.store import Artifact, Store

LARGE = (".parquet", ".bin", ".starts", ".safetensors")
"""Payload files that a run itself never reads."""


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
