"""What the server can be asked: one table, from which both the routes and the OpenAPI document are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lineshaft.serve.replies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    EmbeddingList,
    ModelCard,
    ModelList,
    Status,
    Tokens,
    Version,
)
from lineshaft.serve.wire import ChatAsked, ChatToTokenize, CompletionAsked, EmbeddingAsked, TextToTokenize, TokensToText

_BODY = (400, 404, 408, 413, 415, 429, 500, 503)


@dataclass(frozen=True)
class Endpoint:
    """One path and its method."""

    name: str
    """Of its handler."""
    method: Literal["GET", "POST"]
    path: str
    summary: str
    bodies: Sequence[type] = ()
    """What may be sent, as JSON."""
    answer: type | str = str
    """What comes back: a struct as JSON, or the media type of a text."""
    chunk: type | None = None
    """What the events of a stream hold, where it can stream."""
    errors: Sequence[int] = (500,)
    """Statuses of its refusals. Any unknown path is a 404, any other method a 405."""

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """Of the path, as OpenAPI describes them."""
        if "{" not in self.path:
            return []
        return [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]


ENDPOINTS = (
    Endpoint("completion", "POST", "/v1/completions", "Go on with a text", [CompletionAsked], Completion, Completion, _BODY),
    Endpoint("chat", "POST", "/v1/chat/completions", "Answer in a conversation", [ChatAsked], ChatCompletion, ChatChunk, _BODY),
    Endpoint("embeddings", "POST", "/v1/embeddings", "Texts as numbers", [EmbeddingAsked], EmbeddingList, None, _BODY),
    Endpoint("tokenize", "POST", "/tokenize", "The tokens of a text", [TextToTokenize, ChatToTokenize], Tokens, None, _BODY),
    Endpoint("detokenize", "POST", "/detokenize", "The text of tokens", [TokensToText], Detokenized, None, _BODY),
    Endpoint("models", "GET", "/v1/models", "What is served", answer=ModelList),
    Endpoint("one_model", "GET", "/v1/models/{name}", "What is served under a name", answer=ModelCard, errors=(404, 500)),
    Endpoint("health", "GET", "/health", "Does the process live?", answer=Status),
    Endpoint("ready", "GET", "/ready", "Can it answer now?", answer=Status, errors=(500, 503)),
    Endpoint("metrics", "GET", "/metrics", "Prometheus text", answer="text/plain"),
    Endpoint("version", "GET", "/version", "Which lineshaft this is", answer=Version),
    Endpoint("openapi", "GET", "/openapi.json", "This document", answer="application/json"),
)
