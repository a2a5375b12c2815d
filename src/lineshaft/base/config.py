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

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())


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
    unknown = item["type"] == "extra_forbidden"
    strange = unknown or item["type"] == "invalid_key"  # the last part is no field, yet the user wrote it
    *loc, last = item["loc"] if strange else (*item["loc"], "")
    path, notes = _walk(kind, loc)
    dotted = ".".join([part for part in (where, *path) if part] + ([str(last)] if strange else []))
    if unknown:
        known = sorted({name for note in notes if _is_config(note) for name in note.model_fields})
        close = difflib.get_close_matches(str(last), known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        return f'"{dotted}": unknown; {hint}'
    if item["type"] == "missing":
        return f'"{dotted}": missing'
    said = item["msg"].removeprefix("Value error, ")  # what our own checks of several fields say begins with the field
    return f'"{dotted}": {said}{_shown(item["input"], notes)}' if dotted else said


def _walk(kind: type[Config], loc: Iterable[int | str]) -> tuple[list[str], list[Any]]:
    """The parts of an error's place that a user wrote, and the types that may stand there.

    pydantic puts the tags of unions among the parts; no user wrote those, so they only narrow the types.
    """
    path: list[str] = []
    notes: list[Any] = [kind]
    for part in loc:
        deeper = [inner for note in notes for inner in _inside(note, part)]
        if deeper:
            path.append(str(part))
            notes = deeper
        else:
            notes = [note for note in notes if getattr(note, "__name__", "") == part] or notes
    return path, notes


def _inside(note: Any, part: int | str) -> list[Any]:
    """The types that may stand at `part` of a value of type `note`."""
    if _is_config(note):
        return _members(note.model_fields[part].annotation) if part in note.model_fields else []
    origin, args = typing.get_origin(note), typing.get_args(note)
    if (origin is list and isinstance(part, int)) or (origin is dict and part != "[key]"):
        return _members(args[-1])
    return []


def _members(note: Any) -> list[Any]:
    """The types that an annotation may stand for: unions and Annotated looked through."""
    if typing.get_origin(note) is typing.Annotated:
        return _members(typing.get_args(note)[0])
    if typing.get_origin(note) in (typing.Union, types.UnionType):
        return [member for inner in typing.get_args(note) for member in _members(inner)]
    return [note]


def _is_config(note: Any) -> bool:
    return isinstance(note, type) and issubclass(note, Config)


def _shown(value: Any, notes: list[Any]) -> str:
    """The refused value, short enough for a line; nothing where a secret stands or the value may hold one."""
    if any(note in (pydantic.SecretStr, pydantic.SecretBytes) or _is_config(note) for note in notes) or isinstance(value, dict):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= 100 else text[:97] + '...'})"


def nested_configs(kind: type[Config], field: str) -> list[type[Config]]:
    """The Config classes a field may hold, looking through unions and Optional."""
    return [note for note in _members(kind.model_fields[field].annotation) if _is_config(note)]


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """`over` laid on `under`: tables are merged key by key, everything else is replaced.

    A table whose keys all count items of a list below, from 0, changes these: `--set compress.1.bits=4`.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, list) and isinstance(value, Mapping) and all(str(place).isdecimal() for place in value):
            items = {str(place): item for place, item in enumerate(below)}
            merged[key] = list(merge(items, value).values())
            continue
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=3` as ("a.b", 3); the value is read as YAML. Raises ConfigError when there is no key or no `=`."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f'"{text}": write it as a.b=value')
    return ".".join(parts), _yaml(value, f'the value of "{key}"')


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
    table = _yaml(text, name)
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: expected a mapping at the top, got {type(table).__name__}")
    return table


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - built on SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets the ValueError of a date such as 2024-99-99 through
        raise ConfigError(f"{name}: not valid YAML: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without three of its traps: a repeated key silently wins, 1e-3 is read as a text, a table may hold itself."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        _refuse_repeats(node)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias for a table or list that has not ended yet
            raise yaml.YAMLError("an alias stands inside of what it names")
        return node


_FLOAT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _refuse_repeats(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            raise yaml.YAMLError(f'the key "{key.value}" stands twice, {str(key.start_mark).strip()}')
        seen.add(key.value)
