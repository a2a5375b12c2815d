"""The recipe: what may stand in it, what is laid over it, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from tiny_line import DEEPSEEK

from lineshaft.base.config import flatten, load
from lineshaft.base.errors import ConfigError
from lineshaft.pipeline.recipe import Recipe, read_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_quickstart_is_a_valid_recipe_with_every_stage() -> None:
    recipe = read_recipe(QUICKSTART).recipe
    assert recipe.name == "quickstart"
    assert recipe.compress and recipe.evaluate and recipe.serve


def test_an_empty_recipe_takes_its_name_from_the_file_and_all_else_from_the_defaults(tmp_path: Path) -> None:
    sourced = read_recipe(written(tmp_path, "{}"))
    assert sourced.recipe == Recipe(name="mine")
    assert set(sourced.origin.values()) == {"default"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trian: {seed: 2}", '"trian": unknown; did you mean "train"'),
        ("train: {loop: {step: 5}}", '"train.loop.step": unknown; did you mean "steps"'),
        ("train: {seed: one}", '"train.seed": .*integer.*one'),
        ("train: null", '"train": '),
        ("serve: {max_tokens: 4}", '"serve.prompt": missing'),
        ("name: a/b", '"name": .*a/b'),
        ("name: ../../x", '"name": '),
        ("data: [1, 2", "mine.yaml: not valid YAML"),
        ("- a list", "mine.yaml: expected a mapping"),
        ("train: {}\ntrain: {}", "stands twice"),
        (f"train: {{model: {DEEPSEEK | {'hidden_sizes': 3}}}}", '"train.model.hidden_sizes": unknown; did you mean "hidden_size"'),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(written(tmp_path, text))


def test_a_file_that_is_no_recipe_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such recipe file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_recipe(tmp_path / "binary")
    with pytest.raises(ConfigError, match=r'"name": .*my recipe'):
        read_recipe(written(tmp_path, "{}", "my recipe.yaml"))
    assert read_recipe(tmp_path / "my recipe.yaml", ["name=mine"]).recipe.name == "mine"


def test_an_assignment_to_a_section_that_is_not_mentioned_changes_that_value_only(tmp_path: Path) -> None:
    path = written(tmp_path, "{}")
    default = dict(flatten(Recipe(name="mine").model_dump()))
    changed = dict(flatten(read_recipe(path, ["train.model.hidden_size=128", "evaluate.speed.batch=2"]).recipe.model_dump()))
    assert {place: changed[place] for place in changed if changed[place] != default[place]} == {
        "train.model.hidden_size": 128,
        "evaluate.speed.batch": 2,
    }


def test_an_assignment_brings_a_left_out_stage_in_and_null_takes_one_out(tmp_path: Path) -> None:
    path = written(tmp_path, "evaluate: null")
    assert read_recipe(path).recipe.evaluate is None
    sourced = read_recipe(path, ["compress.group=32", "evaluate.usd_per_hour=2"])
    assert sourced.recipe.compress and sourced.recipe.compress.group == 32
    assert sourced.recipe.evaluate and sourced.recipe.evaluate.usd_per_hour == 2
    assert read_recipe(QUICKSTART, ["serve=null"]).recipe.serve is None


@pytest.mark.parametrize("assignment", ["train.seed", "=3", "train..seed=3", ".seed=1", "train.seeed=3", "train.seed=[", "name.x=1"])
def test_an_assignment_that_means_nothing_is_refused(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(ConfigError):
        read_recipe(written(tmp_path, "{}"), [assignment])


def test_the_last_assignment_wins(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "train: {seed: 1}"), ["train.seed=2", "train.seed=3"]).recipe.train.seed == 3


def test_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {seed: 7, rows: 3}\ncompress: {}\n")
    sourced = read_recipe(path, ["train.rows=4", "evaluate.speed.batch=2"])
    assert sourced.origin.keys() == dict(flatten(sourced.recipe.model_dump())).keys()
    told = {place: origin for place, origin in sourced.origin.items() if origin != "default"}
    assert told == {"train.seed": "mine.yaml", "train.rows": "--set", "evaluate.speed.batch": "--set"}
    assert sourced.origin["compress.format"] == "default"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"grup": 3}, r'"compress.grup": unknown; did you mean "group"\?'),
        ([{"step": "awq", "alfa": 1}], r'"compress.0.alfa": unknown'),
        ([{"step": "round"}, {"step": "squash"}], '"compress.1": step: one of round, gptq, awq, smooth, static, budget, prune'),
        ({"step": "gptq", "bits": 3}, "bits: 4 or 8, and no format beside it"),
        ({"bits": 4, "format": "int4"}, "bits: 4 or 8, and no format beside it"),
        ([{"step": "prune"}], "nothing is to be cut"),
    ],
    ids=str,
)
def test_steps_that_are_wrong_are_named(given: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(Recipe, {"name": "mine", "compress": given})


def test_bits_are_short_for_a_format() -> None:
    (step,) = load(Recipe, {"name": "mine", "compress": [{"bits": 4}]}).compressing()
    assert step == load(Recipe, {"name": "mine", "compress": {"format": "int4"}}).compress


STEPS = [{"group": 32}, {"step": "awq", "bits": 4}, [{"step": "smooth"}, {"bits": 8}], {"step": "prune", "channels": 0.3}]


@pytest.mark.parametrize("compress", STEPS, ids=str)
def test_editors_accept_the_steps_that_a_run_accepts(compress: object) -> None:
    table = {"name": "mine", "compress": compress}
    assert load(Recipe, table)
    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    assert validator.is_valid(table)
    assert not validator.is_valid({"name": "mine", "compress": {"step": "squash"}})
