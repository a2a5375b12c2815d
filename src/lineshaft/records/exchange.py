"""An exchange: one request to a served model and its answer.

Payload of a traffic artifact: `exchanges.jsonl`, one exchange a line, and `timings.jsonl` with their times in the same
order (not part of the digest).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from lineshaft.base.config import Config, load
from lineshaft.base.store import Artifact, Draft

EXCHANGES_FILE = "exchanges.jsonl"
TIMINGS_FILE = "timings.jsonl"


class Exchange(Config):
    """What was asked and what was answered."""

    model: str
    """Artifact id of the checkpoint that answered."""
    prompt: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Timing(Config):
    """When the answer came."""

    ready_seconds: float
    """From starting the server process to `/ready` answering 200."""
    first_token_seconds: float
    """From sending the request to the first piece of text."""
    seconds: float
    """From sending the request to the end of the stream."""


def write_exchanges(draft: Draft, pairs: Iterable[tuple[Exchange, Timing]]) -> None:
    """Write exchanges and their timings into the draft."""
    kept = list(pairs)
    (draft.root / EXCHANGES_FILE).write_bytes(b"".join(_line(item) for item, _ in kept))
    (draft.root / TIMINGS_FILE).write_bytes(b"".join(_line(timing) for _, timing in kept))
    draft.aside_files.add(TIMINGS_FILE)


def read_exchanges(traffic: Artifact) -> Iterator[tuple[Exchange, Timing]]:
    """The exchanges with their timings, in order."""
    with traffic.path(EXCHANGES_FILE).open("rb") as exchanges, traffic.path(TIMINGS_FILE).open("rb") as timings:
        for exchange, timing in zip(exchanges, timings, strict=True):
            yield load(Exchange, json.loads(exchange)), load(Timing, json.loads(timing))


def _line(item: Config) -> bytes:
    text = json.dumps(item.model_dump(), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # a client may send half a surrogate pair; its escape is valid JSON
