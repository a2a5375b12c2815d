"""Carrying out a recipe: every step made, or found made; then the report."""

from __future__ import annotations

import time
from pathlib import Path

from lineshaft.base.store import Artifact, Store
from lineshaft.base.terminal import say
from lineshaft.pipeline.graph import plan
from lineshaft.pipeline.outcome import Node, Outcome
from lineshaft.pipeline.page.page import write_page
from lineshaft.pipeline.recipe import Recipe
from lineshaft.pipeline.reopen import reopened


def run(store: Store, recipe: Recipe) -> Outcome:
    """Walk the recipe's steps in order; one that was made before with the same config, inputs and parents is not made again.

    The checkpoint at the end of the line gets the recipe's name as its reference. Raises Corrupt when something that was
    made before and is shown or built from now is damaged.
    """
    made: dict[str, Artifact] = {}
    nodes = []
    steps = list(plan(recipe))
    for number, step in enumerate(steps, 1):
        started = time.monotonic()
        request = step.stage.request(step.config, **{role: made[name] for role, name in step.parents.items()})
        ready = reopened(store, request.id)
        say(f"[{number}/{len(steps)}] {step.name}: {request.id}{' (made before)' if ready else ''}")
        made[step.name] = ready or request.carry_out(store)
        nodes.append(Node(step.name, made[step.name], ready is not None, 0.0 if ready else time.monotonic() - started))
    store.set_ref(recipe.name, made.get("compress", made["train"]).id)
    return Outcome(recipe.name, recipe.train.seed, nodes)


def write_report(store: Store, recipe: Recipe, outcome: Outcome) -> Path:
    """Draw the HTML report of a recipe; returns its path."""
    path = store.root / "pages" / f"{recipe.name}.html"
    write_page(outcome, path)
    return path
