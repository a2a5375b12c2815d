"""Tables, from YAML and from assignments, and what is said about the keys and values in them."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base.config import Config, flatten, load, merge, nest, nested_configs, parse_assignment, read_yaml
from lineshaft.base.errors import ConfigError


class Int8(Config):
    """Eight bits."""

    bits: Literal[8] = 8
    group: int = 0
    """Weights that share a scale; 0: a channel."""


class Dense(Config):
    """As it is."""

    dtype: str = "float32"


class Part(Config):
    """One source."""

    weight: float = 1.0
    """Share of the mix."""
    path: str


class Recipe(Config):
    """Everything."""

    seed: int = 0
    """Start of every random draw."""
    rate: float = 1e-3
    format: Int8 | Dense = Int8()
    teacher: Dense | None = None
    parts: list[Part] = pydantic.Field(default_factory=list)
    named: dict[str, Part] = pydantic.Field(default_factory=dict)
    steps: int | Literal["auto"] = "auto"
    token: pydantic.SecretStr | None = None


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"sed": 1}, '"sed": unknown; did you mean "seed"?'),
        ({"format": {"grup": 1}}, '"format.grup": unknown; did you mean "group"?'),
        ({"teacher": {"dtpe": "x"}}, '"teacher.dtpe": unknown; did you mean "dtype"?'),
        ({"parts": [{"path": "a"}, {"path": "b", "wieght": 2}]}, '"parts.1.wieght": unknown; did you mean "weight"?'),
        ({"named": {"x": {"path": "b", "wieght": 2}}}, '"named.x.wieght": unknown; did you mean "weight"?'),
        ({"teacher": {"zzz": 1}}, '"teacher.zzz": unknown; known here: dtype'),
        ({"parts": [{}]}, '"parts.0.path": missing'),
        ({"seed": "7"}, "\"seed\": Input should be a valid integer (got '7')"),
        ({"seed": 1.0}, '"seed"'),
        ({"seed": True}, '"seed"'),
        ({"steps": "atuo"}, "\"steps\": Input should be 'auto' (got 'atuo')"),
        ({"parts": {}}, '"parts"'),
        ({1: 2}, '"1"'),
        ({"seed": "x" * 5000}, "...)"),
    ],
)
def test_a_bad_table_is_told_by_its_path_and_with_a_suggestion(table: Any, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        load(Recipe, table)
    text = str(told.value)
    assert said in text
    assert "Int8" not in text
    assert "Dense" not in text
    assert max(map(len, text.splitlines())) < 250


def test_paths_begin_where_the_table_was_found() -> None:
    with pytest.raises(ConfigError, match=r'^"train\.parts\.0\.path": missing$'):
        load(Recipe, {"parts": [{}]}, where="train")


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        load(Recipe, {"sed": 1, "rate": "fast"})
    assert len(str(told.value).splitlines()) == 2


@pytest.mark.parametrize(
    "table", [{"token": 12345}, {"token": ["12345"]}, {"token": {"a": "12345"}}, {"teacher": "12345"}, {"format": ["12345"]}]
)
def test_a_secret_is_never_repeated(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as told:
        load(Recipe, table)
    assert "12345" not in str(told.value)


def test_a_secret_is_in_neither_the_text_nor_the_manifest_of_a_config() -> None:
    recipe = load(Recipe, {"token": "12345"})
    assert "12345" not in repr(recipe) + str(recipe.model_dump(mode="json"))


def test_a_config_is_frozen_and_takes_whole_numbers_for_floats() -> None:
    recipe = load(Recipe, {"rate": 1, "format": {"dtype": "bfloat16"}})
    assert recipe.rate == 1.0
    assert isinstance(recipe.rate, float)
    assert recipe.format == Dense(dtype="bfloat16")
    with pytest.raises(pydantic.ValidationError):
        recipe.seed = 2


def test_nested_configs_are_found_through_unions_but_not_in_lists() -> None:
    found = {name: nested_configs(Recipe, name) for name in Recipe.model_fields if nested_configs(Recipe, name)}
    assert found == {"format": [Int8, Dense], "teacher": [Dense]}


def test_the_json_schema_carries_the_docstrings_and_forbids_unknown_keys() -> None:
    schema = Recipe.model_json_schema()
    assert schema["properties"]["seed"]["description"] == "Start of every random draw."
    assert schema["$defs"]["Int8"]["properties"]["group"]["description"].startswith("Weights that share a scale")
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-1E+3", -1e3), ("1.5e3", 1.5e3), (".5e3", 500.0), ("3", 3), ("0.1", 0.1), ("1e", "1e"), ("e3", "e3"), ("1.e3", 1e3)],
)
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    read = read_yaml(f"a: {text}", "recipe")["a"]
    assert (read, type(read)) == (value, type(value))
    assert parse_assignment(f"a={text}")[1] == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(number: float) -> None:
    assert read_yaml(f"a: {number!r}", "r") == {"a": number}
    assert read_yaml(f"a: {number:e}", "r") == {"a": float(f"{number:e}")}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "a:\n- {b: 1, b: 1}",
        "a: [",
        "- 1",
        "",
        "just text",
        "a: 2024-99-99",
        "a: !!python/object/apply:os.system [ls]",
        "a: &x [*x]",
        "a: &x {b: {c: *x}}",
        "a: *nothing",
        "a: " + "[" * 5000,
        "a: \x00",
        "{[1]: 2}",
    ],
)
def test_a_text_that_is_no_plain_table_is_refused_by_the_name_of_its_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^recipe\.yaml: "):
        read_yaml(text, "recipe.yaml")


def test_a_repeated_key_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r'"steps" stands twice.*line 3'):
        read_yaml("train:\n  steps: 1\n  steps: 2\n", "r")


def test_a_merge_key_may_be_overruled_at_any_depth() -> None:
    text = "a: &a {x: 1, y: 1}\nz: {deep: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 3}\n"
    table = read_yaml(text, "r")
    assert table["c"] == {"x": 2, "y": 3}
    assert table["z"]["deep"] == {"x": 2, "y": 1}


NAMES = st.text("abcxyz", min_size=1, max_size=3)
TEXTS = st.text(st.characters(exclude_characters="\x85", codec="utf-8"), max_size=5)  # PyYAML writes that one so that it reads a space
LEAVES = st.integers() | st.floats(allow_nan=False) | TEXTS | st.booleans() | st.none() | st.lists(st.integers(), max_size=3)
TABLES = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=3), lambda inner: st.dictionaries(NAMES, inner | LEAVES, max_size=3), max_leaves=10
)


@given(TABLES)
def test_yaml_tables_are_read_back(table: dict[str, Any]) -> None:
    assert read_yaml(yaml.safe_dump(table, allow_unicode=True), "r") == table


@given(TABLES)
def test_a_table_is_the_sum_of_its_leaves(table: dict[str, Any]) -> None:
    total: dict[str, Any] = {}
    for path, value in flatten(table):
        total = merge(total, nest(path, value))
    assert total == table


@given(TABLES, TABLES)
def test_merging_keeps_what_lies_above_and_changes_neither(under: dict[str, Any], over: dict[str, Any]) -> None:
    kept = repr(under), repr(over)
    merged = merge(under, over)
    assert (repr(under), repr(over)) == kept
    assert merge(merged, over) == merged
    assert merge(under, {}) == under
    assert merge({}, over) == over
    assert under.keys() | over.keys() == merged.keys()
    leaves = dict(flatten(merged))
    assert all(leaves[path] == value for path, value in flatten(over) if value != {})


@given(st.lists(NAMES, min_size=1, max_size=4), LEAVES)
def test_an_assignment_is_read_like_yaml(parts: list[str], value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    key, read = parse_assignment(f" {' . '.join(parts)} ={text}")
    assert (key, read) == (".".join(parts), value)


@pytest.mark.parametrize("text", ["", "a", "=1", "a..b=1", ".a=1", "a=[", "a=2024-99-99", "a=&x [*x]", "a={b: 1, b: 2}"])
def test_a_bad_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_assignment(text)


def test_an_assigned_text_may_hold_an_equals_sign() -> None:
    assert parse_assignment("data.source=/a=b") == ("data.source", "/a=b")


def test_items_of_a_list_are_changed_by_their_numbers() -> None:
    steps = {"steps": [{"kind": "a"}, {"kind": "b", "bits": 8}]}
    assert merge(steps, nest("steps.1.bits", 4)) == {"steps": [{"kind": "a"}, {"kind": "b", "bits": 4}]}
    assert merge(steps, nest("steps.2", {"kind": "c"}))["steps"][2] == {"kind": "c"}
    assert merge(steps, nest("steps.kind", "c")) == {"steps": {"kind": "c"}}  # no number: it takes the list's place
    assert steps == {"steps": [{"kind": "a"}, {"kind": "b", "bits": 8}]}
