"""Configuration: small frozen pydantic models, strict, with a suggestion for every unknown key.

Every configurable part owns a `Config` class beside its code. The docstring under a field is its help text,
on the command line and in the exported JSON Schema alike. Tables come from YAML and from `--set a.b=c`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pydantic
import yaml

from lineshaft.base.errors import ConfigError

Table = dict[str, Any]
C = TypeVar("C", bound="Config")


class Config(pydantic.BaseModel):
    """Base of all configuration: frozen, strict, unknown keys refused."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def load(kind: type[C], table: Mapping[str, Any], where: str = "") -> C:
    """Build `kind` from a plain table.

    Raises ConfigError that names each bad key by its dotted path, says what is wrong with it, and suggests the
    key that was probably meant. `where` is a prefix for those paths, such as `train`.
    """
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_complaint(kind, where, item) for item in error.errors())) from None


def _complaint(kind: type[Config], where: str, item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    dotted = ".".join(([where] if where else []) + path)
    if item["type"] == "extra_forbidden":
        known = sorted(_keys_beside(kind, path))
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        return f'"{dotted}": unknown; {hint}'
    if item["type"] == "missing":
        return f'"{dotted}": missing'
    return f'"{dotted}": {item["msg"]} (got {item["input"]!r})'


def _keys_beside(kind: type[Config], path: list[str]) -> set[str]:
    """Field names of the table in which the last part of `path` stands."""
    here: list[type[Config]] = [kind]
    for part in path[:-1]:
        deeper = [nested for model in here if part in model.model_fields for nested in nested_configs(model, part)]
        here = deeper or here  # a union's tag stands in the path but is no field
    return {name for model in here for name in model.model_fields}


def nested_configs(kind: type[Config], field: str) -> list[type[Config]]:
    """The Config classes a field may hold, looking through unions and Optional."""
    found: list[type[Config]] = []
    queue: list[Any] = [kind.model_fields[field].annotation]
    while queue:
        note = queue.pop()
        if isinstance(note, type) and issubclass(note, Config):
            found.append(note)
        elif typing.get_origin(note) in (typing.Union, types.UnionType, typing.Annotated):
            queue.extend(typing.get_args(note))
    return found


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """`over` laid on `under`: tables are merged key by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=3` as ("a.b", 3); the value is read as YAML. Raises ConfigError when there is no key or no `=`."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f'"{text}": write it as a.b=value')
    try:
        return key.strip(), _yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f'"{text}": the value is not valid YAML: {error}') from None


def nest(dotted: str, value: Any) -> Table:
    """`nest("a.b", 3)` is `{"a": {"b": 3}}`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return typing.cast(Table, value)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables as (dotted path, value); an empty table is a leaf."""
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def read_yaml(text: str, name: str) -> Table:
    """A YAML mapping as a table. Raises ConfigError for bad syntax, a repeated key, or anything but a mapping."""
    try:
        table = _yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: expected a mapping at the top, got {type(table).__name__}")
    return table


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - built on SafeLoader


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without two of its traps: a repeated key that silently wins, and 1e-3 read as a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_repeats(str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _refuse_repeats(keys: Iterable[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise yaml.YAMLError(f'the key "{key}" stands twice')
        seen.add(key)
