"""What a recipe file may say: one section for each stage, each section the stage's own config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from lineshaft.base.config import Config, Table, flatten, load, merge, nest, parse_assignment, read_yaml
from lineshaft.base.errors import ConfigError
from lineshaft.compress.steps import Steps
from lineshaft.data.ingest import IngestConfig
from lineshaft.data.tokenizer import TokenizerConfig
from lineshaft.data.tokens import TokenizeConfig
from lineshaft.evaluate.stage import EvaluateConfig
from lineshaft.serve.ask import AnswerConfig
from lineshaft.train.stage import TrainConfig


class Recipe(Config):
    """The whole line, from raw text to an answering service. compress, evaluate and serve may be null: then they are left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Names the report and the reference under which the finished checkpoint can be served; by default the file's name."""
    data: IngestConfig = IngestConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokenizeConfig = TokenizeConfig()
    train: TrainConfig = TrainConfig()
    compress: Steps | None = None
    """A step, such as `{step: awq, bits: 4}`, or a list of them; leave it out to keep the checkpoint as it was trained."""
    evaluate: EvaluateConfig | None = EvaluateConfig()
    serve: AnswerConfig | None = None
    """One question to the served model at the end."""

    def compressing(self) -> list[Config]:
        """The steps of `compress`, one or several, in order."""
        if self.compress is None:
            return []
        return list(self.compress) if isinstance(self.compress, list) else [self.compress]


@dataclass(frozen=True)
class Sourced:
    """A recipe, and where each of its values came from."""

    recipe: Recipe
    origin: Mapping[str, str]
    """Dotted path of every value to "default", the recipe's file name, or "--set"."""


def read_recipe(path: Path, assignments: Sequence[str] = ()) -> Sourced:
    """Read a recipe file and lay `a.b=value` assignments over it. Raises ConfigError for all that is wrong with either."""
    written = read_yaml(_text(path), str(path))
    table: Table = {"name": path.stem} | written
    defaults = Recipe(name="recipe").model_dump()
    set_paths: dict[str, Any] = {}
    for text in assignments:
        dotted, value = parse_assignment(text)
        table = assign(table, defaults, dotted, value)
        set_paths |= dict(flatten(nest(dotted, value)))
    recipe = load(Recipe, table)
    origins = {place: "default" for place, _ in flatten(recipe.model_dump())}
    for origin, places in ((path.name, dict(flatten(written))), ("--set", set_paths)):
        origins |= {place: origin for place in places if place in origins}
    return Sourced(recipe, origins)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: a recipe is UTF-8 text, this is not (byte {error.start})") from None


def assign(table: Table, defaults: Mapping[str, Any], dotted: str, value: Any) -> Table:
    """`table` with one value set. A section that the table does not mention starts from its defaults, not from nothing."""
    parts = dotted.split(".")
    for depth in range(1, len(parts)):
        section, default = _at(table, parts[:depth]), _at(defaults, parts[:depth])
        if section is None and isinstance(default, Mapping):
            table = merge(table, nest(".".join(parts[:depth]), default))
    return merge(table, nest(dotted, value))


def _at(table: Mapping[str, Any], parts: list[str]) -> Any:
    here: Any = table
    for part in parts:
        here = here.get(part) if isinstance(here, Mapping) else None
    return here
