"""A stage: what is asked, what is built, and what is found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError, Corrupt
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft, Store


class Count(Config):
    """How far to count."""

    upto: int = 3
    path: str = ""
    threads: int = 0
    """0: as many as the parent has files."""


def build(draft: Draft, config: Count) -> None:
    (draft.root / "numbers").write_text(" ".join(map(str, range(config.upto))))
    draft.facts["upto"] = config.upto


COUNT = Stage("count", "corpus", 1, Count, build)
CHILD = replace(COUNT, name="child", kind="tokens", parents={"corpus": "corpus"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_request_knows_its_id_before_anything_is_made(store: Store) -> None:
    request = COUNT.request(Count())
    assert not list(store.all())
    assert request.carry_out(store).id == request.id
    assert COUNT(store, Count()).path("numbers").read_text() == "0 1 2"


def test_an_equal_call_does_not_build_again_and_a_changed_one_does(store: Store) -> None:
    built: list[int] = []

    def counted(draft: Draft, config: Count) -> None:
        built.append(config.upto)
        build(draft, config)

    stage = replace(COUNT, build=counted)
    for upto in (1, 1, 2, 1):
        stage(store, Count(upto=upto))
    assert built == [1, 2]
    replace(stage, version=2)(store, Count(upto=1))
    replace(stage, inputs=lambda _: {"raw": "00"})(store, Count(upto=1))
    assert built == [1, 2, 1, 1]


def test_an_unkeyed_field_changes_nothing_but_is_remembered(store: Store) -> None:
    stage = replace(COUNT, unkeyed=frozenset({"path"}))
    made = stage(store, Count(path="/here"))
    assert stage(store, Count(path="/there")).id == made.id
    assert made.manifest.config == {"upto": 3, "threads": 0}
    assert made.manifest.aside["config"] == {"path": "/here"}
    assert COUNT(store, Count(path="/here")).id != made.id


def test_a_config_is_settled_before_the_key_is_taken(store: Store) -> None:
    def settle(config: Count, parents: Mapping[str, Artifact]) -> Count:
        return config.model_copy(update={"threads": config.threads or len(parents["corpus"].manifest.files)})

    stage = replace(CHILD, settle=settle)
    corpus = COUNT(store, Count())
    auto, said = stage(store, Count(), corpus=corpus), stage(store, Count(threads=1), corpus=corpus)
    assert auto.id == said.id
    assert auto.manifest.config["threads"] == 1
    assert auto.manifest.parents == {"corpus": corpus.id}
    assert [item.id for item in store.children(corpus.id)] == [auto.id]


def test_parents_must_be_the_ones_asked_for(store: Store) -> None:
    corpus = COUNT(store, Count())
    child = CHILD(store, Count(), corpus=corpus)
    wrong: list[tuple[Any, str]] = [
        ({}, "needs corpus, was given none"),
        ({"tokens": child}, "needs corpus, was given tokens"),
        ({"corpus": corpus, "more": corpus}, "was given corpus, more"),
        ({"corpus": child}, f"corpus must be a corpus, {child.id} is a tokens"),
    ]
    for parents, told in wrong:
        with pytest.raises(ConfigError, match=told):
            CHILD.request(Count(), **parents)
    with pytest.raises(ConfigError, match="needs no parent"):
        COUNT.request(Count(), corpus=corpus)


def test_a_failed_build_leaves_nothing_but_its_scratch_which_goes_with_success(store: Store) -> None:
    tries: list[bool] = []

    def resumes(draft: Draft, config: Count) -> None:
        state = draft.scratch / "state"
        tries.append(state.exists())
        if not state.exists():
            (draft.root / "numbers").write_text("half")
            state.write_text("1")
            raise ZeroDivisionError
        build(draft, config)

    stage = replace(COUNT, build=resumes)
    with pytest.raises(ZeroDivisionError):
        stage(store, Count())
    assert not list(store.all())
    made = stage(store, Count())
    assert tries == [False, True]
    assert [path.name for path in sorted(made.root.iterdir())] == ["manifest.json", "numbers"]
    assert not list((store.root / "work").iterdir())


def test_nothing_is_built_from_a_damaged_parent_even_when_it_was_only_found(store: Store, make: Callable[..., Artifact]) -> None:
    corpus = make(store, {"a": b"hello"})
    corpus.path("a").write_bytes(b"hellp")
    found = store.find(corpus.id)  # the size is right, and no more was looked at
    assert found
    with pytest.raises(Corrupt, match="/a: block 0"):
        CHILD(store, Count(), corpus=found)
    assert [item.id for item in store.all()] == [corpus.id]


def test_two_stores_give_equal_digests(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        digests.add(CHILD(store, Count(), corpus=COUNT(store, Count())).manifest.digest)
    assert len(digests) == 1
