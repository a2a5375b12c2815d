"""`lineshaft show` and `lineshaft verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lineshaft.base.config import flatten
from lineshaft.base.errors import BrokenContract, Corrupt, NotFound
from lineshaft.base.store import Store
from lineshaft.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from lineshaft.text import contract

ArtifactArgument = Annotated[str | None, typer.Argument(help="Reference or artifact id; without it everything in the store is taken.")]


def show(artifact: ArtifactArgument = None, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
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


def verify(artifact: ArtifactArgument = None, store: StoreOption = DEFAULT_STORE) -> None:
    """Read every byte of an artifact, or of all of them, against its checksums, and its tokenizer against its chat contract."""
    kept = _existing(store)
    damaged: list[Corrupt | BrokenContract] = []
    for name in [artifact] if artifact else _folders(kept):
        try:
            found = kept.open(name)
            contract.carried(found, found.root)
        except (Corrupt, BrokenContract) as error:  # go on: whoever repairs a store wants the whole list
            damaged.append(error)
            continue
        sizes = [item.size for item in [*found.manifest.files, *found.manifest.aside_files]]
        print(f"{found.id}: {len(sizes)} files, {sum(sizes)} bytes, all as written; digest {found.manifest.digest}")
    if damaged:
        raise type(damaged[0])("\n".join(str(error) for error in damaged))


def _folders(store: Store) -> list[str]:
    """Ids of all artifacts by their folders: a manifest that can't be read is a finding here, not the end."""
    return sorted(path.name for path in (store.root / "artifacts").iterdir() if path.is_dir())


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
    if found is None:
        raise NotFound(f"{artifact}: points to {artifact_id}, which is no longer in {store.root}")
    children = [{"id": item.id, "stage": item.stage} for item in store.children(artifact_id)]
    refs = [name for name, target in store.refs().items() if target == artifact_id]
    return {"path": str(found.root), "refs": refs, "manifest": found.manifest.model_dump(mode="json"), "children": children}


def _print_one(shown: dict[str, Any]) -> None:
    manifest = shown["manifest"]
    print(f"{manifest['id']}  (made by {manifest['stage']}, version {manifest['version']})")
    print(f"  path      {shown['path']}")
    print(f"  digest    {manifest['digest']}")
    for name in shown["refs"]:
        print(f"  ref       {name}")
    for role, parent in manifest["parents"].items():
        print(f"  parent    {role}: {parent}")
    for child in shown["children"]:
        print(f"  child     {child['id']}  (made by {child['stage']})")
    facts = dict(manifest["facts"])
    if kept := facts.pop(contract.FACT, None):
        print(f"  contract  {contract.described(kept)}")
    for title, lines in (
        ("input", manifest["inputs"]),
        ("config", manifest["config"]),
        ("fact", facts),
        ("aside", manifest["aside"]),
    ):
        for place, value in flatten(lines):
            print(f"  {title:9} {place} = {json.dumps(value, ensure_ascii=False)}")
    for item in [*manifest["files"], *manifest["aside_files"]]:
        print(f"  file      {item['name']}  {item['size']} bytes  sha256 {item['sha256'][:16]}  {len(item['crc32'])} blocks")
