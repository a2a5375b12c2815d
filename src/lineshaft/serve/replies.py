"""What goes over the wire: answers as OpenAI's and vLLM's clients expect them. `voice` and `service` fill them."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length"]


class Usage(Struct):
    """Tokens that a request cost: each prompt once, and all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Struct):
    """Tokens of a completion in four lists of equal length. The first token of a prompt has no probability: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens by their text, and the one that was taken."""
    text_offset: list[int]
    """Where each token begins in `text` (in a stream, in the text of all chunks), in characters."""


class CompletionChoice(Struct):
    """Text of a completion, or in a stream the next piece of it."""

    text: str
    finish_reason: FinishReason | None
    index: int = 0
    logprobs: CompletionLogprobs | None = None


class Alternative(Struct):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int]
    """Its UTF-8 bytes, which may be a part of a character only."""


class ChatToken(Struct):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(Struct):
    """Tokens of a chat answer."""

    content: list[ChatToken]
    refusal: None = None


class ChatText(Struct):
    """What the assistant says: a whole message, or in a stream the next piece. Fields left unset are not sent."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct):
    """A whole chat answer."""

    message: ChatText
    finish_reason: FinishReason
    index: int = 0
    logprobs: ChatLogprobs | None = None


class ChatChunkChoice(Struct):
    """A piece of a chat answer."""

    delta: ChatText
    finish_reason: FinishReason | None
    index: int = 0
    logprobs: ChatLogprobs | None = None


class Completion(Struct, kw_only=True):
    """A whole completion, or one chunk of its stream; the last chunk may carry the usage and no choice."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Struct, kw_only=True):
    """One chunk of a chat stream; the last may carry the usage and no choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET


Answer = Completion | ChatCompletion | ChatChunk


class EmbeddingUsage(Struct):
    """Tokens that embeddings cost."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct):
    """One text as numbers, or as base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(Struct):
    """Answer of /v1/embeddings."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Tokens(Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    """Answer of /detokenize."""

    prompt: str


class ModelCard(Struct):
    """One entry of /v1/models."""

    id: str
    created: int
    max_model_len: int | UnsetType = UNSET
    """Most tokens of prompt and answer; unset while the model loads."""
    object: Literal["model"] = "model"
    owned_by: str = "lineshaft"


class ModelList(Struct):
    """Answer of /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Status(Struct):
    """Answer of a probe that is green."""

    status: Literal["ok", "ready"]


class Version(Struct):
    """Answer of /version."""

    version: str


class ErrorDetail(Struct):
    """What was wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Struct):
    """Body of every answer that is an error."""

    error: ErrorDetail
