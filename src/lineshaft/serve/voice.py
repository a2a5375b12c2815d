"""How an answer is worded: the bodies and chunks of /v1/completions and of /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from typing import Literal, Protocol

from msgspec import UNSET, UnsetType

from lineshaft.serve.wire import Answer, ChatChoice, ChatChunkChoice, ChatText, CompletionChoice, FinishReason, Usage


class Voice(Protocol):
    """Words one answer."""

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> Answer:
        """The answer to a request that is not streamed."""

    def opening(self) -> list[Answer]:
        """Chunks before the first text."""

    def piece(self, text: str, finish: FinishReason | None) -> Answer:
        """A chunk with text, or the last one, with the reason for the end."""

    def closing(self, usage: Usage) -> Answer:
        """The chunk that holds the token counts."""


class CompletionVoice:
    """Words a completion."""

    def __init__(self, model: str) -> None:
        self._head = _Head("cmpl", model)

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> Answer:
        """See Voice."""
        return self._head.answer("text_completion", [CompletionChoice(text, finish)], usage)

    def opening(self) -> list[Answer]:
        """See Voice."""
        return []

    def piece(self, text: str, finish: FinishReason | None) -> Answer:
        """See Voice."""
        return self._head.answer("text_completion", [CompletionChoice(text, finish)])

    def closing(self, usage: Usage) -> Answer:
        """See Voice."""
        return self._head.answer("text_completion", [], usage)


class ChatVoice:
    """Words a chat answer."""

    def __init__(self, model: str) -> None:
        self._head = _Head("chatcmpl", model)

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> Answer:
        """See Voice."""
        return self._head.answer("chat.completion", [ChatChoice(ChatText("assistant", text), finish)], usage)

    def opening(self) -> list[Answer]:
        """See Voice."""
        return [self._chunk(ChatText("assistant", ""), None)]

    def piece(self, text: str, finish: FinishReason | None) -> Answer:
        """See Voice."""
        return self._chunk(ChatText(content=text) if text else ChatText(), finish)

    def closing(self, usage: Usage) -> Answer:
        """See Voice."""
        return self._head.answer("chat.completion.chunk", [], usage)

    def _chunk(self, delta: ChatText, finish: FinishReason | None) -> Answer:
        return self._head.answer("chat.completion.chunk", [ChatChunkChoice(delta, finish)])


class _Head:
    """What all chunks of an answer share."""

    def __init__(self, prefix: str, model: str) -> None:
        self._id, self._created, self._model = f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def answer(
        self,
        kind: Literal["text_completion", "chat.completion", "chat.completion.chunk"],
        choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice],
        usage: Usage | UnsetType = UNSET,
    ) -> Answer:
        return Answer(self._id, kind, self._created, self._model, choices, usage)
