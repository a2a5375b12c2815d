"""What comes over the wire: requests as OpenAI's and vLLM's clients send them. Shapes and ranges only; `read` turns bytes into these.

The answers stand in `replies`. The OpenAPI document is made from both, so it can't say anything else than what is checked here.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from lineshaft.sched.request import MOST_LOGPROBS

_LARGEST = (1 << 63) - 1
_PRIORITY = (1 << 31) - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024

Count = Annotated[int, Meta(ge=1, le=_LARGEST)]
CountFromZero = Annotated[int, Meta(ge=0, le=_LARGEST)]
TokenId = Annotated[int, Meta(ge=0, le=_LARGEST)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Text = Annotated[str, Meta(min_length=1)]
Prompts: TypeAlias = Text | Annotated[list[Text | TokenId | Ids], Meta(min_length=1)]
"""A text, ids, or a list of texts or of lists of ids. (That a list holds one kind only is checked later: msgspec can't say it.)"""
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Alternatives = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream is to look."""

    include_usage: bool | None = None
    """Send token counts in a chunk of their own before the end."""
    continuous_usage_stats: bool | None = None
    """vLLM's field: send the counts so far in every chunk, too."""


class Asked(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that both kinds of request for text share. None is what the client left out or sent as null."""

    model: str
    n: Count | None = None
    """Answers to each prompt. Default 1."""
    max_tokens: CountFromZero | None = None
    """Most tokens of an answer. 0 is for completions with `echo` only."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 is greedy. Default 1."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-_LARGEST, le=_LARGEST)] | None = None
    """Equal seeds give equal draws; answer i of several has seed + i."""
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)] | None = None
    """Token ids, as strings, to what is added to their logits."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: str | None = None
    """The client's own label; nothing depends on it."""
    top_k: Annotated[int, Meta(ge=-1, le=_LARGEST)] | None = None
    """vLLM's field: 0 and -1 mean all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """vLLM's field."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """vLLM's field, with bounds that keep logits finite."""
    ignore_eos: bool | None = None
    """vLLM's field: go on past the end token."""
    stop_token_ids: list[TokenId] | None = None
    """vLLM's field: more tokens that end the answer."""
    priority: Annotated[int, Meta(ge=-_PRIORITY, le=_PRIORITY)] | None = None
    """vLLM's field: lower numbers are worked on first. Default 0."""


class CompletionAsked(Asked, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: Prompts
    best_of: Count | None = None
    """Only as many as `n`: nothing is sorted out."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    logprobs: Alternatives | None = None
    """Tell each token's log-probability and those of so many of the likeliest; with `echo` the prompt's, too."""


class TextPart(Struct, forbid_unknown_fields=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


Messages = Annotated[list[Message], Meta(min_length=1)]


class ChatAsked(Asked, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Tell each token's log-probability."""
    top_logprobs: Alternatives | None = None
    """And those of so many of the likeliest; needs `logprobs`."""


class EmbeddingAsked(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    """base64: the little-endian float32 numbers."""
    dimensions: Count | None = None
    """Only the model's own number of them."""
    user: str | None = None
    """The client's own label; nothing depends on it."""


class TextToTokenize(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /tokenize with a text, as in vLLM."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's bos before it, as for a completion. Default true."""
    return_token_strs: bool | None = None
    """Tell each token's text, too."""


class ChatToTokenize(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /tokenize with a conversation, as in vLLM."""

    messages: Messages
    model: str | None = None
    add_generation_prompt: bool | None = None
    """End where the assistant begins. Default true."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's bos before what the template gives, which has its own as a rule. Default false."""
    return_token_strs: bool | None = None
    """Tell each token's text, too."""


class TokensToText(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /detokenize, as in vLLM."""

    tokens: list[TokenId]
    model: str | None = None
