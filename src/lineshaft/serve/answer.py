"""Answers in the making: tokens in, text and log-probabilities out, until the model or a stop string ends each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct

from lineshaft.sched.request import Emitted, Event, PromptScored, Score
from lineshaft.serve.replies import FinishReason
from lineshaft.serve.stops import StopScanner
from lineshaft.serve.worker import Ticket
from lineshaft.text.detokenize import Decodes, Detokenizer


class Scored(Struct, frozen=True):
    """A token and how likely it was."""

    token: int
    score: Score | None
    """None for the first token of a prompt."""
    offset: int
    """Where it begins in the choice's text, in characters."""


class Piece(Struct, frozen=True):
    """What came new for one choice; the pieces of a choice together are its answer."""

    choice: int
    text: str
    tokens: list[Scored]
    """When log-probabilities were asked for: the tokens whose text is out with this piece."""
    finish: FinishReason | None
    """Why the answer ended; set on its last piece only."""

    def __bool__(self) -> bool:
        """Is there anything to tell?"""
        return bool(self.text or self.tokens or self.finish)


@dataclass(frozen=True)
class Echo:
    """The prompt, where the answer is to begin with it."""

    text: str
    ids: list[int]
    silent: bool
    """Nothing else is wanted."""


class Telling:
    """Turns the events of one choice into the text its client may see."""

    def __init__(self, choice: int, tokenizer: Decodes, stops: Sequence[str], echo: Echo | None = None) -> None:
        self.choice = choice
        self._tokenizer, self._echo = tokenizer, echo
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._decoded = self._shown = len(echo.text) if echo else 0
        """Characters that the tokens gave, and of these, how many are out."""
        self._held: list[Scored] = []
        """Tokens whose text is not out yet."""
        self.tokens = 0
        """Tokens taken so far, with the one that ended the answer."""
        self.finish: FinishReason | None = None
        """Why the answer ended; None while it goes on."""

    def take(self, told: Event) -> Piece:
        """Take what the engine told. Nothing may be taken once `finish` is set."""
        if isinstance(told, PromptScored):
            assert self._echo
            self._held = _placed(self._echo.ids, told.scores, self._tokenizer)
            return Piece(self.choice, "", [], None)
        assert isinstance(told, Emitted)  # nothing else was asked for
        opening, silent = (self._echo.text, self._echo.silent) if self._echo else ("", False)
        self._echo = None
        if silent:
            self.finish = "length"
        else:
            opening += self._push(told)
        return Piece(self.choice, opening, self._released(), self.finish)

    def _push(self, emitted: Emitted) -> str:
        """Take a token. Returns the text that can be shown now."""
        self.tokens += 1
        is_text = emitted.finish != "stop"  # the token that the model ends with says "stop" and nothing else
        if is_text and emitted.score:
            self._held.append(Scored(emitted.token, emitted.score, self._decoded))
        text = self._detokenizer.push(emitted.token) if is_text else ""
        if emitted.finish:
            text += self._detokenizer.finish()
        self._decoded += len(text)
        shown = self._scanner.push(text)
        if self._scanner.found:
            self.finish = "stop"
        elif emitted.finish:
            self.finish = emitted.finish
            shown += self._scanner.finish()
        self._shown += len(shown)
        return shown

    def _released(self) -> list[Scored]:
        """The tokens whose first character is out; at the end all but those behind the beginning of a stop string."""
        if self.finish and not self._scanner.found:
            ready = len(self._held)
        else:
            ready = next((place for place, item in enumerate(self._held) if item.offset >= self._shown), len(self._held))
        released, self._held = self._held[:ready], self._held[ready:]
        return released


class Answering:
    """One choice: what the engine tells about it, told as text."""

    def __init__(self, ticket: Ticket, telling: Telling) -> None:
        self.ticket, self.telling = ticket, telling

    async def next(self) -> Piece | None:
        """What came new, which may be nothing to tell; None after the last. Raises the LineshaftError that ended the request."""
        if self.telling.finish:
            return None
        piece = self.telling.take(await self.ticket.next())
        self.ticket.answered = self.telling.finish is not None
        return piece


class Chorus:
    """The pieces of several choices, as they come."""

    def __init__(self, choices: Sequence[Answering]) -> None:
        self._choices = choices
        self._coming: dict[asyncio.Task[Piece | None], Answering] = {}
        self._ready: list[Piece] = []
        self._begun = False

    async def next(self) -> Piece | None:
        """The next piece of any choice; None after the last of all."""
        if len(self._choices) == 1:
            return await self._choices[0].next()
        if not self._begun:
            self._begun = True
            self._await(self._choices)
        while not self._ready and self._coming:
            done, _ = await asyncio.wait(self._coming, return_when=asyncio.FIRST_COMPLETED)
            ended = [(task, choice) for task, choice in self._coming.items() if task in done]
            for task, choice in ended:
                del self._coming[task]
                if piece := task.result():
                    self._ready.append(piece)
                if not choice.telling.finish:
                    self._await([choice])
        return self._ready.pop(0) if self._ready else None

    def close(self) -> None:
        """Wait for nothing more."""
        for task in self._coming:
            if not task.cancel() and not task.cancelled():
                task.exception()  # one choice's error was told for all; asyncio would complain about the others'
        self._coming.clear()

    def _await(self, choices: Sequence[Answering]) -> None:
        self._coming |= {asyncio.ensure_future(choice.next()): choice for choice in choices}


def _placed(ids: Sequence[int], scores: Sequence[Score | None], tokenizer: Decodes) -> list[Scored]:
    """The tokens of a prompt at their places in its text."""
    detokenizer, offset, placed = Detokenizer(tokenizer), 0, []
    for token, score in zip(ids, scores, strict=True):
        placed.append(Scored(token, score, offset))
        offset += len(detokenizer.push(token))
    return placed
