"""`lineshaft show` and `lineshaft verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lineshaft.base.errors import NotFound
from lineshaft.base.store import Store

ArtifactArgument = Annotated[str | None, typer.Argument(help="Reference or artifact id; without it everything in the store is listed.")]
StoreOption = Annotated[Path, typer.Option("--store", envvar="LINESHAFT_STORE", help="Folder that holds the artifacts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


def show(artifact: ArtifactArgument = None, store: StoreOption = Path(".lineshaft"), as_json: JsonOption = False) -> None:
    """Show an artifact's manifest, what it was made from and what was made from it."""
    kept = _existing(store)
    shown = _listing(kept) if artifact is None else _one(kept, artifact)
    if as_json:
        print(json.dumps(shown, ensure_ascii=False))
    elif artifact is None:
        for item in shown["artifacts"]:
            print(f"{item['id']:28} {item['stage']:10} {', '.join(item['refs'])}".rstrip())
    else:
        _print_one(shown)


def verify(artifact: Annotated[str, typer.Argument(help="Reference or artifact id.")], store: StoreOption = Path(".lineshaft")) -> None:
    """Read every byte of an artifact against its checksums."""
    found = _existing(store).open(artifact)
    sizes = [item.size for item in [*found.manifest.files, *found.manifest.aside_files]]
    print(f"{found.id}: {len(sizes)} files, {sum(sizes)} bytes, all as written; digest {found.manifest.digest}")


def _existing(store: Path) -> Store:
    if not store.is_dir():
        raise NotFound(f"{store}: there is no store here; run a recipe first, or name another with --store")
    return Store(store)


def _listing(store: Store) -> dict[str, Any]:
    refs = store.refs()
    named = {artifact_id: [name for name, target in refs.items() if target == artifact_id] for artifact_id in refs.values()}
    return {"artifacts": [{"id": item.id, "stage": item.stage, "refs": sorted(named.get(item.id, []))} for item in store.all()]}


def _one(store: Store, artifact: str) -> dict[str, Any]:
    artifact_id = store.resolve(artifact)
    found = store.find(artifact_id)
    assert found is not None  # resolve has just seen it
    children = [{"id": item.id, "stage": item.stage} for item in store.children(artifact_id)]
    return {"path": str(found.root), "manifest": found.manifest.model_dump(mode="json"), "children": children}


def _print_one(shown: dict[str, Any]) -> None:
    manifest = shown["manifest"]
    print(f"{manifest['id']}  ({manifest['stage']}, version {manifest['version']})")
    print(f"  path      {shown['path']}")
    print(f"  digest    {manifest['digest']}")
    for title in ("config", "inputs", "facts", "aside"):
        print(f"  {title:9} {json.dumps(manifest[title], ensure_ascii=False)}")
    for item in [*manifest["files"], *manifest["aside_files"]]:
        print(f"  file      {item['name']}  {item['size']} bytes  sha256 {item['sha256'][:16]}  {len(item['crc32'])} blocks")
    for role, parent in manifest["parents"].items():
        print(f"  parent    {role}: {parent}")
    for child in shown["children"]:
        print(f"  child     {child['id']}  ({child['stage']})")
