"""The store against a plain dict, and one fact at a time."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lineshaft.base import manifest
from lineshaft.base.errors import ConfigError, Corrupt, NotFound, StoreError
from lineshaft.base.store import Artifact, Store

Make = Callable[..., Artifact]
ASK: dict[str, Any] = {"stage": "write", "version": 1, "config": {"text": "hello"}}


class StoreAgainstDict(RuleBasedStateMachine):
    """Requests are (number, parent or None); the model knows which were made and where the references point."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="store-"))
        self.made: dict[tuple[int, int | None], str] = {}
        self.refs: dict[str, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        self.store = Store(self.folder)

    def _ask(self, number: int, parent: int | None) -> dict[str, Any]:
        known = self.made.get((parent, None)) if parent is not None else None
        parents = {"from": self.store.open(known)} if known else {}
        return {"stage": "count", "version": 1, "config": {"number": number}, "parents": parents}

    def _request(self, number: int, parent: int | None) -> tuple[int, int | None]:
        return number, (parent if (parent, None) in self.made else None)

    @rule(number=st.integers(0, 3), parent=st.none() | st.integers(0, 3), fails=st.booleans())
    def draft(self, number: int, parent: int | None, fails: bool) -> None:
        request, ran = self._request(number, parent), False
        try:
            with self.store.draft("tokens", **self._ask(number, parent)) as draft:
                if not isinstance(draft, Artifact):
                    ran = True
                    (draft.root / "number").write_text(str(number))
                    (draft.scratch / "state").write_text("resumable")
                    if fails:
                        raise RuntimeError("on purpose")
        except RuntimeError:
            assert request not in self.made
        else:
            assert ran == (request not in self.made)
            key = manifest.key_of("count", 1, {"number": number}, {}, self._parent_ids(request))
            self.made[request] = manifest.id_of("tokens", key)

    def _parent_ids(self, request: tuple[int, int | None]) -> dict[str, str]:
        return {"from": self.made[request[1], None]} if request[1] is not None else {}

    @rule(name=st.sampled_from(["prod", "canary", "a.b-c_d"]), number=st.integers(0, 3))
    def point(self, name: str, number: int) -> None:
        if target := self.made.get((number, None)):
            self.store.set_ref(name, target)
            self.refs[name] = target
        else:
            with pytest.raises(NotFound):
                self.store.set_ref(name, "tokens-0000000000000000")

    @rule()
    def reopen(self) -> None:
        self.store = Store(self.folder)

    @invariant()
    def the_store_holds_what_the_dict_says(self) -> None:
        if not hasattr(self, "store"):
            return
        assert {item.id for item in self.store.all()} == set(self.made.values())
        assert self.store.refs() == self.refs
        for (number, _), made in self.made.items():
            assert self.store.open(made).path("number").read_text() == str(number)
        for name, target in self.refs.items():
            assert self.store.open(name).id == target
        for (number, parent), made in self.made.items():
            expected = {child for request, child in self.made.items() if parent is None and request[1] == number}
            assert {child.id for child in self.store.children(made)} == expected


StoreAgainstDict.TestCase.settings = example_settings(max_examples=15, stateful_step_count=15, deadline=None)
TestStoreAgainstDict = StoreAgainstDict.TestCase


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_an_equal_request_finds_the_artifact_and_builds_nothing(make: Make, store: Store) -> None:
    first = make(store, {"a.txt": b"hello"})
    with store.draft("corpus", **ASK) as again:
        assert isinstance(again, Artifact)
        assert again.manifest == first.manifest


def test_any_change_of_the_request_gives_another_artifact(make: Make, store: Store) -> None:
    parent = make(store, {"a": b"1"})
    changes: list[dict[str, Any]] = [
        {},
        {"stage": "other"},
        {"version": 2},
        {"config": {"text": "Hello"}},
        {"config": {"text": "hello", "more": None}},
        {"inputs": {"raw": "00"}},
        {"inputs": {"raw": "01"}},
        {"parents": {"corpus": parent}},
        {"parents": {"teacher": parent}},
        {"kind": "tokens"},
    ]
    ids = [make(store, {"a": b"1"}, **change).id for change in changes]
    assert len(set(ids)) == len(changes)


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers() | st.text("xyz") | st.booleans() | st.none(), max_size=4), st.randoms())
def test_the_order_of_keys_does_not_change_the_key(config: dict[str, Any], random: Any) -> None:
    items = list(config.items())
    random.shuffle(items)
    assert manifest.key_of("s", 1, config, {}, {}) == manifest.key_of("s", 1, dict(items), {}, {})


def test_the_digest_can_be_checked_by_hand_and_leaves_out_measurements(make: Make, store: Store, tmp_path: Path) -> None:
    first = make(store, {"a": b"1", "aside/times": b"0.1 s"})
    second = make(Store(tmp_path / "elsewhere"), {"a": b"1", "aside/times": b"0.7 s"})
    assert first.manifest.digest == second.manifest.digest == hashlib.sha256(manifest.content_fields(first.manifest)).hexdigest()
    assert first.manifest.seal != second.manifest.seal


def test_another_payload_gives_another_digest(make: Make, tmp_path: Path) -> None:
    digests = {make(Store(tmp_path / str(n)), files).manifest.digest for n, files in enumerate([{"a": b"1"}, {"a": b"2"}, {"b": b"1"}, {}])}
    assert len(digests) == 4


def test_a_failed_draft_leaves_only_its_scratch(store: Store) -> None:
    for with_scratch in (False, True):
        with pytest.raises(KeyboardInterrupt), store.draft("corpus", **ASK) as draft:
            assert not isinstance(draft, Artifact)
            (draft.root / "half").write_bytes(b"x")
            if with_scratch:
                (draft.scratch / "state").write_bytes(b"s")
            raise KeyboardInterrupt
        left = {str(path.relative_to(store.root / "work")) for path in (store.root / "work").rglob("*") if path.is_file()}
        assert left == ({f"{draft.root.parent.name}/scratch/state"} if with_scratch else set())
    assert not list(store.all())
    with store.draft("corpus", **ASK) as draft:
        assert not isinstance(draft, Artifact)
        assert (draft.scratch / "state").read_bytes() == b"s"
        assert not list(draft.root.iterdir())
    assert not list((store.root / "work").iterdir())


def test_work_left_by_a_run_killed_after_its_rename_is_swept(make: Make, store: Store) -> None:
    made = make(store, {"a": b"1"})
    (store.root / "work" / made.id / "scratch").mkdir(parents=True)
    make(store, {"a": b"1"})
    assert not list((store.root / "work").iterdir())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../work", "/etc", "no/pe", ".hidden", "a b", "x" * 101, "prod\n", "tokens-0123456789abcdef"]
)
def test_a_reference_has_a_plain_name(make: Make, store: Store, name: str) -> None:
    made = make(store, {"a": b"1"})
    with pytest.raises(ConfigError):
        store.set_ref(name, made.id)
    with pytest.raises(NotFound):
        store.open(name)
    assert store.find(name) is None


def test_a_name_can_not_lead_out_of_the_store(make: Make, store: Store, tmp_path: Path) -> None:
    made = make(store, {"a": b"1"})
    shutil.copytree(made.root, tmp_path / made.id)
    for name in (f"../../../{made.id}", str(tmp_path / made.id), f"../artifacts/{made.id}"):
        with pytest.raises(NotFound):
            store.open(name)


def test_an_unknown_name_is_answered_with_the_references_there_are(make: Make, store: Store) -> None:
    store.set_ref("prod", make(store, {"a": b"1"}).id)
    with pytest.raises(NotFound, match=r"references here: prod"):
        store.open("prdo")


def test_a_damaged_reference_is_refused_by_name(make: Make, store: Store) -> None:
    store.set_ref("prod", make(store, {"a": b"1"}).id)
    (store.root / "refs" / "prod").write_text("../../etc\n")
    with pytest.raises(Corrupt, match="refs/prod: block 0"):
        store.open("prod")


def test_foreign_entries_in_the_artifacts_folder_are_not_artifacts(make: Make, store: Store) -> None:
    made = make(store, {"a": b"1"})
    (store.root / "artifacts" / ".DS_Store").write_bytes(b"")
    (store.root / "artifacts" / "lost+found").mkdir()
    assert [item.id for item in store.all()] == [made.id]


def test_a_payload_holds_plain_files_only(store: Store, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    for number, spoil in enumerate(
        [
            lambda root: (root / "link").symlink_to(tmp_path / "outside"),
            lambda root: (root / "folder").symlink_to(tmp_path),
            lambda root: (root / manifest.FILE_NAME).write_text("{}"),
        ]
    ):
        with pytest.raises(StoreError, match="plain files"), store.draft("corpus", **{**ASK, "version": number}) as draft:
            assert not isinstance(draft, Artifact)
            spoil(draft.root)
    with pytest.raises(StoreError, match=r"timings\.json"), store.draft("corpus", **ASK) as draft:
        assert not isinstance(draft, Artifact)
        draft.aside_files.add("timings.json")
    assert not list(store.all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_facts_that_json_can_not_hold_are_refused_in_words(store: Store, value: Any) -> None:
    with pytest.raises(StoreError, match="finite"), store.draft("corpus", **ASK) as draft:
        assert not isinstance(draft, Artifact)
        draft.facts["loss"] = value
    with pytest.raises(StoreError, match="finite"), store.draft("corpus", **{**ASK, "config": {"a": value}}):
        raise AssertionError("no key, no draft")
    assert not list(store.all())


def test_a_store_that_can_not_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="name another folder"):
        Store(tmp_path / "file")


def test_a_payload_is_the_same_whatever_order_it_was_written_in(make: Make, tmp_path: Path) -> None:
    files = {"b/x": b"1", "a": b"2", "b/a": b"", "c": b"4"}
    digests = set()
    for number, order in enumerate(itertools.permutations(files)):
        digests.add(make(Store(tmp_path / str(number)), {name: files[name] for name in order}).manifest.digest)
    assert len(digests) == 1


def test_every_byte_is_on_disk_before_the_folder_is_renamed(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    plain_sync, plain_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{handle}"))
        plain_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return plain_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    made = make(store, {"a": b"1", "deep/b": b"2"})
    before, after = steps[: steps.index("rename")], steps[steps.index("rename") + 1 :]
    payload = str(store.root / "work" / made.id / "payload")
    assert {f"{payload}{part}" for part in ("", "/a", "/deep", "/deep/b")} <= set(before)
    assert "manifest.json" in before[-2]  # under its temporary name, and then the folder that it was renamed in
    assert before[-1] == payload
    assert after == [str(store.root / "artifacts")]
