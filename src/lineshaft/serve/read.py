"""From bytes to a request: checks a body's shape and says precisely what is wrong with it.

A field is one of four: known and used; known to OpenAI's or vLLM's clients but not supported, which is refused unless it
asks for what happens anyway; null, which counts as left out; or unknown, which is refused by name, because an answer
that silently ignores what was asked for is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from lineshaft.base.errors import RequestError
from lineshaft.serve.wire import Asked, ChatAsked, ChatToTokenize, CompletionAsked, EmbeddingAsked, TextToTokenize, TokensToText

HARMLESS: Mapping[str, Sequence[Any]] = {
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "top_logprobs": [],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "reasoning_effort": [],
    "web_search_options": [],
    "service_tier": ["auto", "default"],
    "store": [False],
    "metadata": [{}],
}
"""Fields that clients may send with a request for text, each with the values that ask for nothing special. Where a request has a field
of that name, that counts."""

_SHOWN = 80
"""Characters of a client's own text that a message repeats."""

S = TypeVar("S", bound=msgspec.Struct)
A = TypeVar("A", bound=Asked)


def read_completion(body: bytes) -> CompletionAsked:
    """Body of POST /v1/completions. Raises RequestError naming the field at fault."""
    asked = _generation(_table(body), CompletionAsked)
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise RequestError(f'"best_of" must be left out or equal "n" ({asked.n or 1}): answers are not ranked here', "best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise RequestError('"max_tokens": 0 asks for nothing: add "echo": true to get the prompt back, or ask for 1 or more', "max_tokens")
    return asked


def read_chat(body: bytes) -> ChatAsked:
    """Body of POST /v1/chat/completions. Raises RequestError naming the field at fault."""
    asked = _generation(_with_messages(_table(body)), ChatAsked)
    if asked.max_tokens == 0:
        raise RequestError('"max_tokens" must be 1 or more', "max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError('"top_logprobs" needs "logprobs": true', "top_logprobs")
    return asked


def read_embedding(body: bytes) -> EmbeddingAsked:
    """Body of POST /v1/embeddings. Raises RequestError naming the field at fault."""
    return _converted(_table(body), EmbeddingAsked)


def read_tokenize(body: bytes) -> TextToTokenize | ChatToTokenize:
    """Body of POST /tokenize. Raises RequestError naming the field at fault."""
    table = _table(body)
    return _converted(_with_messages(table), ChatToTokenize) if "messages" in table else _converted(table, TextToTokenize)


def read_detokenize(body: bytes) -> TokensToText:
    """Body of POST /detokenize. Raises RequestError naming the field at fault."""
    return _converted(_table(body), TokensToText)


def shown(text: str) -> str:
    """A client's text, short enough to be repeated in a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _table(body: bytes) -> dict[str, Any]:
    try:
        table = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} can't be read") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    if not isinstance(table, dict):
        raise RequestError("the body must be a JSON object")
    return _without_nulls(table)


def _with_messages(table: dict[str, Any]) -> dict[str, Any]:
    """Clients send back the messages that they got, with a null in every field that was not used."""
    messages = table.get("messages")
    if not isinstance(messages, list):
        return table
    return table | {"messages": [_without_nulls(item) if isinstance(item, dict) else item for item in messages]}


def _generation(table: dict[str, Any], kind: type[A]) -> A:
    """A request for text, without fields that ask for what happens anyway."""
    for name in table.keys() & HARMLESS.keys() - set(kind.__struct_fields__):
        value = table.pop(name)
        if not any(type(value) is type(harmless) and value == harmless for harmless in HARMLESS[name]):
            raise RequestError(f'"{name}" is not supported by this server with this value: leave it out', name)
    asked = _converted(table, kind)
    if asked.stream_options is not None and not asked.stream:
        raise RequestError('"stream_options" needs "stream": true', "stream_options")
    if asked.stream_options and asked.stream_options.continuous_usage_stats and not asked.stream_options.include_usage:
        raise RequestError('"stream_options.continuous_usage_stats" needs "include_usage": true', "stream_options")
    return asked


def _converted(table: dict[str, Any], kind: type[S]) -> S:
    if unknown := [name for name in table if name not in kind.__struct_fields__]:
        told = ", ".join(f'"{shown(name)}"' for name in unknown[:8])
        raise RequestError(f"unknown here: {told}: remove it", shown(unknown[0]))
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error)) from None


def _complaint(text: str) -> RequestError:
    """msgspec's "Expected `int` >= 1 - at `$.max_tokens`" as our error."""
    what, _, where = text.partition(" - at ")
    path = where.strip("`").removeprefix("$").removeprefix(".")
    if missing := re.search(r"required field `(\w+)`", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
    param = re.split(r"[.\[]", path)[0] or None
    return RequestError(f'"{path}": {what}' if path else what, param)


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}
