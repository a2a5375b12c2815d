"""The graph of a recipe: which stage works from which, as a plain table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lineshaft.base.config import Config
from lineshaft.base.stage import Stage
from lineshaft.compress.steps import STEPS as COMPRESSING
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.evaluate.stage import EVALUATE
from lineshaft.pipeline.recipe import Recipe
from lineshaft.serve.ask import ANSWER
from lineshaft.train.stage import PRETRAIN


@dataclass(frozen=True)
class Step:
    """One stage in its place."""

    name: str
    stage: Stage[Any]
    section: str
    """The recipe's section that configures it; the step is left out when that is null."""
    parents: Mapping[str, tuple[str, ...]]
    """Role to the steps that can fill it: the first one that is in the recipe does."""


STEPS = (
    Step("data", INGEST, "data", {}),
    Step("tokenizer", TRAIN_TOKENIZER, "tokenizer", {"corpus": ("data",)}),
    Step("tokens", TOKENIZE, "tokens", {"corpus": ("data",), "tokenizer": ("tokenizer",)}),
    Step("train", PRETRAIN, "train", {"tokens": ("tokens",), "tokenizer": ("tokenizer",)}),
    Step("evaluate_base", EVALUATE, "evaluate", {"checkpoint": ("train",), "tokens": ("tokens",)}),
    Step("evaluate_compressed", EVALUATE, "evaluate", {"checkpoint": ("compress",), "tokens": ("tokens",)}),
    Step("serve", ANSWER, "serve", {"checkpoint": ("compress", "train")}),
)
"""Parents stand before children. Those of `compress` stand behind `train`: a recipe says which and how many (`_compressing`)."""


@dataclass(frozen=True)
class Planned:
    """A step of one recipe, with its config and the names of the steps it works from."""

    name: str
    stage: Stage[Any]
    config: Config
    parents: Mapping[str, str]


def plan(recipe: Recipe) -> Iterator[Planned]:
    """The steps that this recipe has, in order. A step whose parent was left out is left out with it."""
    present: set[str] = set()
    for step, config in _steps(recipe):
        chosen = {role: next((name for name in names if name in present), None) for role, names in step.parents.items()}
        if config is None or None in chosen.values():
            continue
        present.add(step.name)
        yield Planned(step.name, step.stage, config, {role: name for role, name in chosen.items() if name})


def _steps(recipe: Recipe) -> Iterator[tuple[Step, Config | None]]:
    for step in STEPS:
        yield step, getattr(recipe, step.section)
        if step.name == "train":
            yield from _compressing(recipe)


def _compressing(recipe: Recipe) -> Iterator[tuple[Step, Config]]:
    """A step for each of `compress`. The last one is named so itself, those before it by what they do, numbered from the second on."""
    configs, before, seen = recipe.compressing(), "train", Counter[str]()
    for number, config in enumerate(configs, 1):
        kind = str(getattr(config, "step"))  # noqa: B009 - each step's config has one, their base does not
        seen[kind] += 1
        name = "compress" if number == len(configs) else kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"
        stage = COMPRESSING[kind]
        parents = {role: (before,) if role == "checkpoint" else (role,) for role in stage.parents}
        yield Step(name, stage, "compress", parents), config
        before = name
