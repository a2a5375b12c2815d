"""Bytes to the server and back: a request's body, and the events of a streamed answer. Pure; called by `client`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from lineshaft.evaluate.load.workload import Ask

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
DONE = b"[DONE]"
LONGEST_LINE = 4 << 20
"""Bytes of one event; a server that sends more is not speaking this language."""


class Usage(Struct):
    """Token counts of a request."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Delta(Struct):
    """A piece of a chat answer; models that think aloud put that into a field of its own."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(Struct):
    """A piece of an answer."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Event(Struct):
    """One event of a stream, as far as we look at it."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def has_text(self) -> bool:
        """Whether it carries something of the answer, as opposed to a role, an end or a count."""
        deltas = [choice.delta for choice in self.choices if choice.delta]
        thoughts = any(delta.content or delta.reasoning_content or delta.reasoning for delta in deltas)
        return thoughts or any(choice.text for choice in self.choices)

    @property
    def finishes(self) -> bool:
        """Whether it ends the answer."""
        return any(choice.finish_reason for choice in self.choices)


def body(api: Api, model: str, ask: Ask, *, ignore_eos: bool, temperature: float) -> bytes:
    """The JSON of a request that streams and reports its token counts."""
    table: dict[str, Any] = {
        "model": model,
        "max_tokens": ask.max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        table["ignore_eos"] = True
    said: dict[str, Any] = {"messages": [{"role": "user", "content": ask.prompt}]} if api == "chat" else {"prompt": ask.prompt}
    return msgspec.json.encode(table | said)


_decoder = msgspec.json.Decoder(Event)


def event(payload: bytes) -> Event:
    """An event's payload read. Raises ValueError when it is none."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None


class Lines:
    """Cuts a stream of bytes into the payloads of its events, whatever the pieces in which it comes."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """Payloads that `data` completes. Raises ValueError for a line without an end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
