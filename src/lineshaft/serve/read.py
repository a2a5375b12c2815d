"""From bytes to a job for the engine: checks a request's body and says precisely what is wrong with it.

A field is one of four: known and used; known to OpenAI's or vLLM's clients but not supported yet, which is refused
unless it asks for what happens anyway; null, which counts as left out; or unknown, which is refused by name, because an
answer that silently ignores what was asked for is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from lineshaft.base.errors import RequestError, TooLong
from lineshaft.sched.request import Sampling
from lineshaft.serve.wire import Asked, ChatAsked, CompletionAsked, Message
from lineshaft.text.chat import render_chat
from lineshaft.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions. A chat answer may fill the context."""

_NOT_SUPPORTED: Mapping[str, Sequence[Any]] = {
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "logprobs": [False],
    "top_logprobs": [],
    "logit_bias": [{}],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, 0.0],
    "repetition_penalty": [1, 1.0],
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
"""Fields that clients may send, each with the values that ask for nothing special."""

A = TypeVar("A", bound=Asked)


@dataclass(frozen=True)
class Job:
    """What the engine is to do, and how the answer is to be told."""

    prompt: list[int]
    sampling: Sampling
    stops: list[str]


def read_completion(body: bytes) -> CompletionAsked:
    """Body of POST /v1/completions. Raises RequestError naming the field at fault."""
    return _converted(_checked_fields(_table(body), CompletionAsked), CompletionAsked)


def read_chat(body: bytes) -> ChatAsked:
    """Body of POST /v1/chat/completions. Raises RequestError naming the field at fault."""
    table = _checked_fields(_table(body), ChatAsked)
    if isinstance(messages := table.get("messages"), list):
        # clients send back what they got, with a null in every field that was not used
        table["messages"] = [_without_nulls(item) if isinstance(item, dict) else item for item in messages]
    return _converted(table, ChatAsked)


def completion_job(asked: CompletionAsked, tokenizer: Tokenizer, context_tokens: int) -> Job:
    """The job for a completion. Raises RequestError or TooLong."""
    prompt = _completion_prompt(asked, tokenizer)
    most = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    return _job(asked, prompt, most, asked.max_tokens is not None, tokenizer, context_tokens)


def chat_job(asked: ChatAsked, tokenizer: Tokenizer, context_tokens: int) -> Job:
    """The job for a chat answer. Raises RequestError or TooLong."""
    if tokenizer.chat_template is None:
        raise RequestError("this model has no chat template: use /v1/completions")
    text = render_chat(
        tokenizer.chat_template,
        [_message(item) for item in asked.messages],
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        add_generation_prompt=True,
    )
    prompt = tokenizer.encode_templated(text)
    if not prompt:
        raise RequestError("the chat template renders these messages as an empty prompt", "messages")
    most = _chat_limit(asked)
    return _job(asked, prompt, most or context_tokens, most is not None, tokenizer, context_tokens)


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


def _checked_fields(table: dict[str, Any], kind: type[Asked]) -> dict[str, Any]:
    """The table without fields that ask for what happens anyway."""
    for name in table.keys() & _NOT_SUPPORTED.keys():
        value = table.pop(name)
        if not any(type(value) is type(harmless) and value == harmless for harmless in _NOT_SUPPORTED[name]):
            raise RequestError(f'"{name}" is not supported by this server with this value: leave it out', name)
    if unknown := [name for name in table if name not in kind.__struct_fields__]:
        raise RequestError("unknown here: " + ", ".join(f'"{name}"' for name in unknown) + ": remove it", unknown[0])
    return table


def _converted(table: dict[str, Any], kind: type[A]) -> A:
    try:
        asked = msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error)) from None
    if asked.stream_options is not None and not asked.stream:
        raise RequestError('"stream_options" needs "stream": true', "stream_options")
    return asked


def _complaint(text: str) -> RequestError:
    """msgspec's "Expected `int` >= 1 - at `$.max_tokens`" as our error."""
    what, _, where = text.partition(" - at ")
    path = where.strip("`").removeprefix("$").removeprefix(".")
    if missing := re.search(r"required field `(\w+)`", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
    param = re.split(r"[.\[]", path)[0] or None
    return RequestError(f'"{path}": {what}' if path else what, param)


def _completion_prompt(asked: CompletionAsked, tokenizer: Tokenizer) -> list[int]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return _with_bos(prompt, tokenizer)
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return _checked_ids(ids, tokenizer, "prompt")
    if len(prompt) > 1:
        raise RequestError('several prompts in one request are not supported by this server: send one "prompt" a request', "prompt")
    only = prompt[0]
    return _with_bos(only, tokenizer) if isinstance(only, str) else _checked_ids(only, tokenizer, "prompt")


def _with_bos(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text as the documents of training began. Ids that a client sends are taken as they are."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


def _checked_ids(ids: Any, tokenizer: Tokenizer, field: str) -> list[int]:
    if bad := next((number for number in ids if number >= tokenizer.vocab_size), None):
        raise RequestError(f'"{field}": token id {bad} is outside the vocabulary of {tokenizer.vocab_size}', field)
    return list(ids)


def _message(message: Message) -> dict[str, Any]:
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    return {"role": message.role, "content": content} | ({} if message.name is None else {"name": message.name})


def _chat_limit(asked: ChatAsked) -> int | None:
    both = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(both) > 1:
        raise RequestError('"max_tokens" and "max_completion_tokens" differ: send one', "max_completion_tokens")
    return both.pop() if both else None


def _job(asked: Asked, prompt: list[int], most: int, explicit: bool, tokenizer: Tokenizer, context_tokens: int) -> Job:
    left = context_tokens - len(prompt)
    if left < (most if explicit else 1):
        raise TooLong(
            f"the model's context holds {context_tokens} tokens; the prompt has {len(prompt)}"
            + (f" and max_tokens asks for {most}" if explicit else "")
            + ": shorten one of them",
            "messages" if isinstance(asked, ChatAsked) else "prompt",
        )
    sampling = Sampling(
        max_tokens=min(most, left),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(asked.top_k or 0, 0),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        min_p=asked.min_p or 0.0,
        seed=asked.seed,
        stop_token_ids=_checked_ids(asked.stop_token_ids or [], tokenizer, "stop_token_ids"),
        ignore_eos=asked.ignore_eos or False,
    )
    return Job(prompt, sampling, [asked.stop] if isinstance(asked.stop, str) else asked.stop or [])


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}
