"""What goes over the wire: requests as OpenAI's clients send them, answers as they expect them.

Shapes and limits only. `read` turns bytes into these, `api` fills the answers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

_LARGEST = (1 << 63) - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256

FinishReason = Literal["stop", "length"]
Count = Annotated[int, Meta(ge=1, le=_LARGEST)]
TokenId = Annotated[int, Meta(ge=0, le=_LARGEST)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Prompt = Annotated[str, Meta(min_length=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]


# -- requests ---------------------------------------------------------------------------------------------------


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream is to look."""

    include_usage: bool | None = None
    """Send token counts in a chunk of their own before the end."""


class Asked(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that both kinds of request share. None is what the client left out or sent as null."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 is greedy. Default 1."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-_LARGEST, le=_LARGEST)] | None = None
    user: str | None = None
    """The client's own label; nothing depends on it."""
    top_k: Annotated[int, Meta(ge=-1, le=_LARGEST)] | None = None
    """vLLM's field: 0 and -1 mean all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """vLLM's field."""
    ignore_eos: bool | None = None
    """vLLM's field: go on past the end token."""
    stop_token_ids: list[TokenId] | None = None
    """vLLM's field: more tokens that end the answer."""


class CompletionAsked(Asked, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: Prompt | Annotated[list[Prompt | TokenId | Ids], Meta(min_length=1)]


class TextPart(Struct, forbid_unknown_fields=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatAsked(Asked, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens."""


# -- answers ----------------------------------------------------------------------------------------------------


class Usage(Struct):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(Struct):
    """Text of a completion, or in a stream the next piece of it."""

    text: str
    finish_reason: FinishReason | None
    index: int = 0
    logprobs: None = None


class ChatText(Struct):
    """What the assistant says: a whole message, or in a stream the next piece. Fields left unset are not sent."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct):
    """A whole chat answer."""

    message: ChatText
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class ChatChunkChoice(Struct):
    """A piece of a chat answer."""

    delta: ChatText
    finish_reason: FinishReason | None
    index: int = 0
    logprobs: None = None


class Answer(Struct):
    """A whole answer, or one chunk of a stream; the last chunk may carry the usage and no choice."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET


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


class ErrorDetail(Struct):
    """What was wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Struct):
    """Body of every answer that is an error."""

    error: ErrorDetail
