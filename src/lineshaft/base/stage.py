"""A stage: from a config and parent artifacts to one artifact, cached by what it is asked for.

A stage is a plain value that can be called: `corpus = INGEST(store, IngestConfig(source="docs/"))`. The recipe, the
command line and Python all go through here, so a stage means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.base.manifest import Kind, id_of, key_of
from lineshaft.base.store import Artifact, Draft, Store

C = TypeVar("C", bound=Config)


def _no_inputs(_: Any) -> dict[str, str]:
    return {}


def _as_it_is(config: C, _: Mapping[str, Artifact]) -> C:
    return config


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One kind of work. `build` fills the draft; everything else says when that can be skipped."""

    name: str
    kind: Kind
    """What it makes."""
    version: int
    """Raise it when the same request would now give other bytes: old results are then never mistaken for new ones."""
    config: type[C]
    build: Callable[[Draft, C], None]
    parents: Mapping[str, Kind] = field(default_factory=dict)
    """Role to kind of each artifact it works from."""
    inputs: Callable[[C], dict[str, str]] = _no_inputs
    """Content digests of what it reads from outside the store."""
    settle: Callable[[C, Mapping[str, Artifact]], C] = _as_it_is
    """Replaces `auto` values by what they mean here, before the key is taken."""
    unkeyed: frozenset[str] = frozenset()
    """Config fields that can't change the result's bytes, such as the place a file was read from."""

    def request(self, config: C, **parents: Artifact) -> Request[C]:
        """The same call, not yet carried out: its artifact id is known, nothing is made."""
        self._check_parents(parents)
        config = self.settle(config, parents)
        return Request(self, config, self.inputs(config), parents)

    def __call__(self, store: Store, config: C, /, **parents: Artifact) -> Artifact:
        """Make the artifact, or find it made."""
        return self.request(config, **parents).carry_out(store)

    def _check_parents(self, parents: Mapping[str, Artifact]) -> None:
        if parents.keys() != self.parents.keys():
            raise ConfigError(f"{self.name}: needs {', '.join(self.parents) or 'no parent'}, was given {', '.join(parents) or 'none'}")
        for role, parent in parents.items():
            if parent.manifest.kind != self.parents[role]:
                raise ConfigError(f"{self.name}: {role} must be a {self.parents[role]}, {parent.id} is a {parent.manifest.kind}")


@dataclass(frozen=True)
class Request(Generic[C]):
    """A stage with its settled config, input digests and parents: enough to know the id of the result."""

    stage: Stage[C]
    config: C
    inputs: dict[str, str]
    parents: Mapping[str, Artifact]

    @property
    def id(self) -> str:
        """Id of the artifact that this request makes."""
        ids = {role: parent.id for role, parent in self.parents.items()}
        return id_of(self.stage.kind, key_of(self.stage.name, self.stage.version, self._keyed(), self.inputs, ids))

    def _keyed(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude=set(self.stage.unkeyed))

    def carry_out(self, store: Store) -> Artifact:
        """Make the artifact, or find it made."""
        made = store.draft(
            self.stage.kind,
            stage=self.stage.name,
            version=self.stage.version,
            config=self._keyed(),
            inputs=self.inputs,
            parents=self.parents,
        )
        with made as draft:
            if isinstance(draft, Artifact):
                return draft
            for parent in self.parents.values():
                store.check(parent)  # a cached parent was only found, not read
            self.stage.build(draft, self.config)
            draft.aside |= {"config": self.config.model_dump(mode="json", include=set(self.stage.unkeyed))}
        finished = store.find(self.id)
        assert finished is not None  # the lines above have just put it there
        return finished
