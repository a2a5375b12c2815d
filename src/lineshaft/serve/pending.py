"""A request for text on its way through the engine: its answer as a whole, or as the events of a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from lineshaft.base.errors import LineshaftError
from lineshaft.serve.answer import Answering, Chorus, Piece
from lineshaft.serve.job import Job
from lineshaft.serve.refusals import error_answer, took_too_long
from lineshaft.serve.replies import Answer, Usage
from lineshaft.serve.voice import Voice
from lineshaft.serve.wire import Asked
from lineshaft.serve.worker import Ticket

T = TypeVar("T")


class Deadline:
    """When a request must have been answered. One timer for the whole request: a timeout for each token would cost more than the token."""

    def __init__(self, arrived: float, seconds: float) -> None:
        """`arrived`: a time of `time.monotonic`. To be made, used and closed inside the event loop."""
        self._seconds, self._passed = seconds, False
        self._waiting: asyncio.Task[Any] | None = None
        left = max(arrived + seconds - time.monotonic(), 0)
        self._timer = asyncio.get_running_loop().call_later(left, self._ring)

    async def keep(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises Capacity (408) once the time has passed, and cancels what is being waited for."""
        if self._passed:
            work.close()
            raise took_too_long(self._seconds)
        self._waiting = task = asyncio.current_task()
        assert task
        try:
            return await work
        except asyncio.CancelledError:
            if self._passed and task.uncancel() == 0:  # else somebody else wants the end of it, too
                raise took_too_long(self._seconds) from None
            raise
        finally:
            self._waiting = None

    def close(self) -> None:
        """Ring no more."""
        self._timer.cancel()

    def _ring(self) -> None:
        self._passed = True
        if self._waiting:
            self._waiting.cancel()


class Pending:
    """A request for text that the engine works on. Whoever has one must close it."""

    def __init__(self, voice: Voice, job: Job, choices: Sequence[Answering], asked: Asked, clock: Deadline) -> None:
        """Choices are numbered as in the job; `clock`: until when they must be complete."""
        self.streamed = bool(asked.stream)
        options = asked.stream_options
        self._counted = bool(options and options.include_usage)
        self._always_counted = bool(options and options.continuous_usage_stats)
        self._voice, self._prompt_tokens, self._choices = voice, job.prompt_tokens, choices
        self._chorus = Chorus(choices)
        self._clock = clock
        self._first: list[Piece] = []

    async def whole(self) -> Answer:
        """The complete answer. Raises the LineshaftError that ended it."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        while piece := await self._next():
            pieces[piece.choice].append(piece)
        return self._voice.whole([_joined(own) for own in pieces], self._usage())

    async def begin(self) -> None:
        """Wait until there is something to tell. Raises the LineshaftError that ended the request before that."""
        piece = await self._next()
        assert piece  # every answer has a last piece
        self._first.append(piece)

    async def events(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream, after `begin`. An error that ends it is told as its last event but one."""
        for chunk in self._voice.opening(len(self._choices)):
            yield _event(chunk)
        try:
            while piece := self._first.pop() if self._first else await self._next():
                yield _event(self._voice.piece(piece, self._usage() if self._always_counted else UNSET))
            if self._counted:
                yield _event(self._voice.closing(self._usage()))
        except LineshaftError as error:
            yield _event(error_answer(error))
        yield b"data: [DONE]\n\n"

    def close(self, release: Callable[[Ticket], None]) -> None:
        """Let go of everything; what has not ended is cancelled."""
        self._clock.close()
        self._chorus.close()
        for choice in self._choices:
            release(choice.ticket)

    async def _next(self) -> Piece | None:
        """The next piece that says something; None after the last."""
        while (piece := await self._clock.keep(self._chorus.next())) is not None and not piece:
            continue
        return piece

    def _usage(self) -> Usage:
        answered = sum(choice.telling.tokens for choice in self._choices)
        return Usage(self._prompt_tokens, answered, self._prompt_tokens + answered)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    last = pieces[-1]
    tokens = [token for piece in pieces for token in piece.tokens]
    return Piece(last.choice, "".join(piece.text for piece in pieces), tokens, last.finish)


def _event(answer: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(answer) + b"\n\n"
