"""The graph of a recipe: which stage works from which, as a plain table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lineshaft.base.config import Config
from lineshaft.base.stage import Stage
from lineshaft.compress.stage import COMPRESS
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
    Step("compress", COMPRESS, "compress", {"checkpoint": ("train",)}),
    Step("evaluate_base", EVALUATE, "evaluate", {"checkpoint": ("train",), "tokens": ("tokens",)}),
    Step("evaluate_compressed", EVALUATE, "evaluate", {"checkpoint": ("compress",), "tokens": ("tokens",)}),
    Step("serve", ANSWER, "serve", {"checkpoint": ("compress", "train")}),
)
"""Parents stand before children."""


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
    for step in STEPS:
        config = getattr(recipe, step.section)
        chosen = {role: next((name for name in names if name in present), None) for role, names in step.parents.items()}
        if config is None or None in chosen.values():
            continue
        present.add(step.name)
        yield Planned(step.name, step.stage, config, {role: name for role, name in chosen.items() if name})
