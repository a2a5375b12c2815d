"""What a model wrote when it was to go on with held-out documents, kept in its report.

Payload: `generations.jsonl`, one prompt a line, part of the artifact's digest. Reports of older versions have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lineshaft.base.config import Config, load
from lineshaft.base.store import Artifact, Draft

GENERATIONS_FILE = "generations.jsonl"


class Generation(Config):
    """One prompt, and both ways in which it goes on: as the document does, and as the model does."""

    document: int
    """Number of the held-out document, from 0, that the prompt begins."""
    prompt_ids: list[int]
    prompt: str
    truth: str
    """What follows in the document, as many tokens as the model may write."""
    ids: list[int]
    """What the model wrote, the end token included where it wrote one."""
    text: str
    """The same without an end token."""
    finish_reason: str
    """`stop`: the model ended its text; `length`: it was cut off."""


def write_generations(draft: Draft, generations: Sequence[Generation]) -> None:
    """Write them into the draft; no file for none."""
    if generations:
        lines = (json.dumps(item.model_dump(), ensure_ascii=False) + "\n" for item in generations)
        (draft.root / GENERATIONS_FILE).write_text("".join(lines), encoding="utf-8")


def read_generations(report: Artifact) -> list[Generation]:
    """In the order of the documents; empty where the report has none."""
    path = report.path(GENERATIONS_FILE)
    if not path.is_file():
        return []
    with path.open("rb") as lines:
        return [load(Generation, json.loads(line), where=GENERATIONS_FILE) for line in lines]
