"""Batch mode: a file of requests in OpenAI's format, answered without a socket, on the same path as HTTP requests.

A rerun goes on where an earlier run ended, however it ended.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from pydantic import PositiveFloat, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import CacheFull, Capacity, EngineError, LineshaftError
from lineshaft.base.terminal import Bar, bar
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.batch_files import Journal, Line, Requests, journal, read_requests
from lineshaft.serve.limits import Limits
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.refusals import body_too_large, error_answer, status_of
from lineshaft.serve.service import Service
from lineshaft.serve.starting import started
from lineshaft.serve.worker import Worker

_POLL_S = 0.05
_WAITING = 256
"""Answers that may wait in the worker's queue."""
_TRIES = 3
"""How often a request on which the engine failed is handed in, since it may have been another one's fault."""
_STOP_SECONDS = 5.0
"""How long the end waits for the engine's present step."""


class BatchConfig(Config):
    """How a file of requests is answered."""

    in_flight: PositiveInt = 64
    """Requests that are with the engine at a time."""
    engine_stall_seconds: PositiveFloat = 300.0
    """An engine that has work and finishes no step in so long is ended and started again."""
    limits: Limits = Limits(request_seconds=86400.0)
    """Bounds on one request."""


class BatchResponse(Struct):
    """What the server would have answered."""

    status_code: int
    request_id: str
    body: Struct


class BatchAnswer(Struct):
    """A line of the output, in OpenAI's format."""

    id: str
    custom_id: str
    response: BatchResponse
    error: None = None


@dataclass
class Tally:
    """What became of a batch."""

    requests: int
    earlier: int
    """Answered by runs before this one."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Of the answers of this run."""

    @property
    def refused(self) -> int:
        """Requests of this run whose answer is an error."""
        return self.statuses.total() - self.statuses[200]


def run_batch(folder: Path, name: str, source: Path, target: Path, config: BatchConfig, engine: EngineConfig) -> Tally:
    """Answer the requests in `source` with the checkpoint in `folder`, which they call `name`, into `target`.

    Raises SourceError for an input with bad lines, ConfigError when `target` or its journal belongs to something else, and whatever
    loading the model raises.
    """

    def worker() -> Worker:
        metrics = Metrics(name)
        return Worker(lambda: started(folder, engine, config.engine_stall_seconds, metrics), metrics, _WAITING)

    return answer_file(worker, name, source, target, config)


def answer_file(make_worker: Callable[[], Worker], model: str, source: Path, target: Path, config: BatchConfig) -> Tally:
    """`run_batch` for any way to make a worker, which is made only when there is something left to do."""
    requests = read_requests(source)
    with journal(target, requests, model) as kept:
        left = [line for line in requests.lines if line.custom_id not in kept.kept]
        tally = Tally(len(requests.lines), len(requests.lines) - len(left))
        if left:
            asyncio.run(_Run(make_worker(), model, requests, kept, config, tally).answer(left))
        kept.publish(requests.lines, target)
    return tally


class _Run:
    """One run over what is left of a batch."""

    def __init__(self, worker: Worker, model: str, requests: Requests, kept: Journal, config: BatchConfig, tally: Tally) -> None:
        self._worker, self._requests, self._kept, self._config, self._tally = worker, requests, kept, config, tally
        self._service = Service(worker, model, config.limits)
        self._active = 0

    async def answer(self, left: Sequence[Line]) -> None:
        """Answer all of them. Raises what ended the worker, should it end."""
        self._worker.start()
        try:
            await self._until_ready()
            with bar("batch", self._tally.requests, done=self._tally.earlier) as progress:
                lines = iter(left)
                hands = [asyncio.ensure_future(self._work(lines, progress)) for _ in range(min(self._config.in_flight, len(left)))]
                try:
                    await asyncio.gather(*hands)
                finally:
                    for hand in hands:
                        hand.cancel()
        finally:
            self._worker.stop()
            await self._worker.join(_STOP_SECONDS)

    async def _work(self, lines: Iterator[Line], progress: Bar) -> None:
        for line in lines:
            self._active += 1
            request = self._requests.read(line)
            status, body = await self._replied(request.url, bytes(request.body))
            number = uuid.uuid4().hex
            answer = BatchAnswer(f"batch_req_{number}", line.custom_id, BatchResponse(status, number, body))
            self._kept.add(line.custom_id, msgspec.json.encode(answer))
            self._tally.statuses[status] += 1
            self._active -= 1
            progress.advance()

    async def _replied(self, url: str, body: bytes) -> tuple[int, Struct]:
        """Status and body of the answer; what would be worth another try over HTTP is tried again here."""
        most = self._config.limits.max_body_bytes
        failures = 0
        while True:
            try:
                if len(body) > most:
                    raise body_too_large(most)
                return 200, await self._service.reply(url, body)
            except LineshaftError as error:
                failures += isinstance(error, EngineError)
                if not self._worth_another_try(error, failures):
                    return status_of(error), error_answer(error)
            await asyncio.sleep(_POLL_S)
            await self._until_ready()

    def _worth_another_try(self, error: LineshaftError, failures: int) -> bool:
        if isinstance(error, EngineError):
            return failures < _TRIES
        if not isinstance(error, Capacity) or isinstance(error, CacheFull):
            return False
        # a queue that is full empties as long as others are being answered
        return status_of(error) == 503 or (status_of(error) == 429 and self._active > 1)

    async def _until_ready(self) -> None:
        """Wait while the model loads. Raises what went wrong when it can't be loaded."""
        while self._worker.state in ("loading", "restarting"):
            await asyncio.sleep(_POLL_S)
        if self._worker.failure:
            raise self._worker.failure
        if self._worker.state != "ready":
            raise EngineError(f"the engine is {self._worker.state}: run the same command again, it goes on from here")


def summary(tally: Tally) -> dict[str, Any]:
    """The outcome for machines."""
    return {
        "requests": tally.requests,
        "answered_earlier": tally.earlier,
        "answered": tally.statuses[200],
        "refused": tally.refused,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
    }
