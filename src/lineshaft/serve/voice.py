"""How an answer is worded: the bodies and chunks of /v1/completions and of /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import UNSET, UnsetType

from lineshaft.sched.request import Score
from lineshaft.serve.answer import Piece, Scored
from lineshaft.serve.names import Names
from lineshaft.serve.replies import (
    Alternative,
    Answer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatText,
    ChatToken,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)

LEAST = -9999.0
"""OpenAI's word for "as good as never": JSON has no minus infinity."""


class Voice(Protocol):
    """Words one answer."""

    def whole(self, choices: Sequence[Piece], usage: Usage) -> Answer:
        """The answer to a request that is not streamed; a piece for each choice, which is all of it."""

    def opening(self, choices: int) -> list[Answer]:
        """Chunks before the first text."""

    def piece(self, piece: Piece, usage: Usage | UnsetType) -> Answer:
        """A chunk with text, or the last one of a choice, with the reason for the end."""

    def closing(self, usage: Usage) -> Answer:
        """The chunk that holds the token counts."""


class CompletionVoice:
    """Words a completion."""

    def __init__(self, model: str, names: Names | None) -> None:
        """`names`: of tokens, when log-probabilities are to be told."""
        self._head, self._names = _head("cmpl", model), names

    def whole(self, choices: Sequence[Piece], usage: Usage) -> Completion:
        """See Voice."""
        return Completion(**self._head, choices=[self._choice(item, self._names) for item in choices], usage=usage)

    def opening(self, choices: int) -> list[Answer]:
        """See Voice."""
        return []

    def piece(self, piece: Piece, usage: Usage | UnsetType) -> Completion:
        """See Voice."""
        return Completion(**self._head, choices=[self._choice(piece, self._names if piece.tokens else None)], usage=usage)

    def closing(self, usage: Usage) -> Completion:
        """See Voice."""
        return Completion(**self._head, choices=[], usage=usage)

    def _choice(self, piece: Piece, names: Names | None) -> CompletionChoice:
        logprobs = _completion_logprobs(piece.tokens, names) if names else None
        return CompletionChoice(piece.text, piece.finish, piece.choice, logprobs)


class ChatVoice:
    """Words a chat answer."""

    def __init__(self, model: str, names: Names | None) -> None:
        """`names`: of tokens, when log-probabilities are to be told."""
        self._head, self._names = _head("chatcmpl", model), names

    def whole(self, choices: Sequence[Piece], usage: Usage) -> ChatCompletion:
        """See Voice."""
        return ChatCompletion(**self._head, choices=[self._choice(item) for item in choices], usage=usage)

    def opening(self, choices: int) -> list[Answer]:
        """See Voice."""
        return [
            ChatChunk(**self._head, choices=[ChatChunkChoice(ChatText("assistant", ""), None, number)], usage=UNSET)
            for number in range(choices)
        ]

    def piece(self, piece: Piece, usage: Usage | UnsetType) -> ChatChunk:
        """See Voice."""
        delta = ChatText(content=piece.text) if piece.text else ChatText()
        logprobs = self._logprobs(piece) if piece.tokens else None
        return ChatChunk(**self._head, choices=[ChatChunkChoice(delta, piece.finish, piece.choice, logprobs)], usage=usage)

    def closing(self, usage: Usage) -> ChatChunk:
        """See Voice."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _choice(self, piece: Piece) -> ChatChoice:
        assert piece.finish  # it is a whole answer
        return ChatChoice(ChatText("assistant", piece.text), piece.finish, piece.choice, self._logprobs(piece))

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._names is None:
            return None
        return ChatLogprobs([_chat_token(item.token, item.score, self._names) for item in piece.tokens if item.score])


def _head(prefix: str, model: str) -> dict[str, Any]:
    """What all chunks of an answer share."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _completion_logprobs(tokens: Sequence[Scored], names: Names) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[names.name(item.token) for item in tokens],
        token_logprobs=[None if item.score is None else max(item.score.logprob, LEAST) for item in tokens],
        top_logprobs=[None if item.score is None else _by_name(item.token, item.score, names) for item in tokens],
        text_offset=[item.offset for item in tokens],
    )


def _by_name(token: int, score: Score, names: Names) -> dict[str, float]:
    told: dict[str, float] = {}
    for number, logprob in (*score.top, (token, score.logprob)):
        told.setdefault(names.name(number), max(logprob, LEAST))  # where two tokens have one name, the likelier
    return told


def _chat_token(token: int, score: Score, names: Names) -> ChatToken:
    top = [Alternative(names.name(number), max(logprob, LEAST), list(names.bytes_of(number))) for number, logprob in score.top]
    return ChatToken(names.name(token), max(score.logprob, LEAST), list(names.bytes_of(token)), top)
