"""A random model of any shape with the tokenizer and tokens of the trainer's miniature, for the calibrated steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import letter_line
from filled import filled
from shapes import SHAPES

from lineshaft.base.config import load
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress.steps import STEPS
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder

ROWS = {"sequences": 6, "sequence_tokens": 16}
INT8: dict[str, Any] = {"format": "int8", "group": None, **ROWS}
"""Fits every width of the shapes."""


@dataclass(frozen=True)
class Line:
    """A checkpoint, and tokens made with its tokenizer."""

    store: Store
    checkpoint: Artifact
    tokens: Artifact

    def compress(self, step: str, **config: Any) -> Artifact:
        """What a step makes of the checkpoint."""
        stage = STEPS[step]
        parents = {"checkpoint": self.checkpoint, "tokens": self.tokens}
        return stage(self.store, load(stage.config, config), **{role: parents[role] for role in stage.parents})


def line(folder: Path, model: Decoder | str) -> Line:
    """A line around this model, or a random one of this shape."""
    store, parents = letter_line.parents(folder)
    model = filled(SHAPES[model], spread=0.15) if isinstance(model, str) else model
    with store.draft("checkpoint", stage="by_hand", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        save_checkpoint(model, draft.root, parents["tokenizer"].root)
    (made,) = (item.id for item in store.all() if item.kind == "checkpoint")
    return Line(store, store.open(made), parents["tokens"])
