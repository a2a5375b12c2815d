"""From a request to what the engine is asked for: prompts as ids, sampling, and whether all of it is within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lineshaft.base.errors import RequestError, TooLong
from lineshaft.sched.request import Ask, Sampling
from lineshaft.serve.limits import Limits
from lineshaft.serve.read import shown
from lineshaft.serve.refusals import too_many_tokens
from lineshaft.serve.wire import Asked, ChatAsked, ChatToTokenize, CompletionAsked, EmbeddingAsked, Message, Prompts, TextToTokenize
from lineshaft.text.chat import render_chat
from lineshaft.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions. A chat answer may fill the context."""
_LEAST_TOP_P = 1e-6
"""The likeliest token alone reaches this in any vocabulary below a million, so less means the same; and far less is 0 in float32."""


@dataclass(frozen=True)
class Room:
    """What a request has to fit into."""

    context_tokens: int
    limits: Limits


@dataclass(frozen=True)
class Job:
    """What the engine is to do for a request for text, and how the answers are to be told. Choices are numbered prompt by prompt."""

    asks: list[Ask]
    """One for each prompt, or for each choice."""
    stops: list[str]
    prompt_tokens: int
    """Of all prompts, each counted once."""
    echoes: list[str] | None = None
    """For each ask its prompt's text, when the answers are to begin with it."""
    silent: bool = False
    """Only the prompt is wanted: the one token that the engine makes anyway is not told."""


def completion_job(asked: CompletionAsked, tokenizer: Tokenizer, room: Room) -> Job:
    """Raises RequestError or TooLong."""
    given = _separate(asked.prompt, "prompt")
    prompts = [_ids(item, tokenizer, "prompt") for item in given]
    asks = _asks(asked, prompts, COMPLETION_TOKENS, asked.max_tokens, tokenizer, room, asked.logprobs)
    counted = sum(map(len, prompts))
    if not asked.echo:
        return Job(asks, _stops(asked), counted)
    echoes = [item if isinstance(item, str) else tokenizer.decode(item) for item in given]
    if asked.logprobs is not None:
        copies = asked.n or 1
        asks = [single for ask in asks for single in _scored(ask)]
        echoes = [text for text in echoes for _ in range(copies)]
    return Job(asks, _stops(asked), counted, echoes, silent=asked.max_tokens == 0)


def chat_job(asked: ChatAsked, tokenizer: Tokenizer, room: Room) -> Job:
    """Raises RequestError or TooLong."""
    prompt = chat_ids(asked.messages, tokenizer, add_generation_prompt=True)
    if not prompt:
        raise RequestError("the chat template renders these messages as an empty prompt", "messages")
    both = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(both) > 1:
        raise RequestError('"max_tokens" and "max_completion_tokens" differ: send one', "max_completion_tokens")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    asks = _asks(asked, [prompt], room.context_tokens, both.pop() if both else None, tokenizer, room, logprobs)
    return Job(asks, _stops(asked), len(prompt))


def embedding_asks(asked: EmbeddingAsked, tokenizer: Tokenizer, room: Room) -> list[Ask]:
    """An ask for each text. Raises RequestError or TooLong."""
    given = _separate(asked.input, "input")
    if len(given) > room.limits.max_inputs:
        raise RequestError(f'"input": {len(given)} texts in one request, the most here are {room.limits.max_inputs}: split it', "input")
    prompts = [_ids(item, tokenizer, "input") for item in given]
    _check_total(sum(map(len, prompts)), room.limits)
    for prompt in prompts:
        if len(prompt) >= room.context_tokens:
            told = f"{room.context_tokens - 1} tokens of a text at most can be embedded; this one has {len(prompt)}: shorten or split it"
            raise TooLong(told, "input")
    return [Ask(prompt, Sampling(max_tokens=1), task="embed") for prompt in prompts]


def token_ids(asked: TextToTokenize | ChatToTokenize, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text or of a conversation. Raises RequestError."""
    if isinstance(asked, TextToTokenize):
        ids, special = tokenizer.encode(asked.prompt), asked.add_special_tokens is not False
    else:
        ids = chat_ids(asked.messages, tokenizer, add_generation_prompt=asked.add_generation_prompt is not False)
        special = asked.add_special_tokens is True
    return _with_bos(ids, tokenizer) if special else ids


def chat_ids(messages: list[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[int]:
    """The conversation through the model's template. Raises RequestError when it has none, or that one refuses it."""
    if tokenizer.chat_template is None:
        raise RequestError("this model has no chat template: use /v1/completions")
    text = render_chat(
        tokenizer.chat_template,
        [_message(item) for item in messages],
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        add_generation_prompt=add_generation_prompt,
    )
    return tokenizer.encode_templated(text)


def checked_ids(ids: list[int], tokenizer: Tokenizer, field: str) -> list[int]:
    """The ids themselves. Raises RequestError for one outside the vocabulary."""
    if bad := next((number for number in ids if number >= tokenizer.vocab_size), None):
        raise RequestError(f'"{field}": token id {bad} is outside the vocabulary of {tokenizer.vocab_size}', field)
    return list(ids)


def _separate(prompt: Prompts, field: str) -> list[str | list[int]]:
    """Each prompt by itself."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    numbers = [item for item in prompt if isinstance(item, int)]
    if len(prompt) not in (len(texts), len(lists), len(numbers)):
        raise RequestError(f'"{field}": a list must hold texts only, or token ids only, or lists of token ids only', field)
    return [numbers] if numbers else [*texts, *lists]


def _ids(given: str | list[int], tokenizer: Tokenizer, field: str) -> list[int]:
    """A text as the documents of training began. Ids that a client sends are taken as they are."""
    return _with_bos(tokenizer.encode(given), tokenizer) if isinstance(given, str) else checked_ids(given, tokenizer, field)


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def _message(message: Message) -> dict[str, Any]:
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    return {"role": message.role, "content": content} | ({} if message.name is None else {"name": message.name})


def _asks(
    asked: Asked, prompts: list[list[int]], usual: int, wanted: int | None, tokenizer: Tokenizer, room: Room, logprobs: int | None
) -> list[Ask]:
    """An ask for each prompt. `usual` and `wanted`: tokens of an answer when the client names none, and what it named."""
    copies = asked.n or 1
    choices = copies * len(prompts)
    field = "prompt" if isinstance(asked, CompletionAsked) else "messages"
    if choices > room.limits.max_choices:
        told = f"{choices} answers in one request, the most here are {room.limits.max_choices}: lower it or send several requests"
        raise RequestError(f'"n": {told}', "n" if copies > 1 else field)
    budget = _check_total(sum(map(len, prompts)) + choices * max(wanted or 1, 1), room.limits)
    most = max(wanted, 1) if wanted is not None else usual if budget is None else min(usual, 1 + budget // choices)
    left = [room.context_tokens - len(prompt) for prompt in prompts]
    if min(left) < (most if wanted is not None else 1):
        raise TooLong(
            f"the model's context holds {room.context_tokens} tokens; the prompt has {room.context_tokens - min(left)}"
            + (f" and max_tokens asks for {most}" if wanted is not None else "")
            + ": shorten one of them",
            field,
        )
    sampling = _sampling(asked, tokenizer, logprobs)
    return [
        Ask(prompt, sampling.model_copy(update={"max_tokens": min(most, free)}), priority=asked.priority or 0, copies=copies)
        for prompt, free in zip(prompts, left, strict=True)
    ]


def _check_total(tokens: int, limits: Limits) -> int | None:
    """How many tokens more the request might ask for; None: any number. Raises RequestError (413) when it is too many already."""
    if limits.max_request_tokens is None:
        return None
    if tokens > limits.max_request_tokens:
        raise too_many_tokens(tokens, limits.max_request_tokens)
    return limits.max_request_tokens - tokens


def _sampling(asked: Asked, tokenizer: Tokenizer, logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(asked.top_k or 0, 0),
        top_p=1.0 if asked.top_p is None else max(asked.top_p, _LEAST_TOP_P),
        min_p=asked.min_p or 0.0,
        seed=asked.seed,
        stop_token_ids=checked_ids(asked.stop_token_ids or [], tokenizer, "stop_token_ids"),
        ignore_eos=asked.ignore_eos or False,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=_biases(asked.logit_bias or {}, tokenizer),
        logprobs=logprobs,
    )


def _biases(given: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < len("1" * 19) and str(int(key)) == key):
            raise RequestError(f'"logit_bias": "{shown(key)}" is no token id', "logit_bias")
    checked_ids([int(key) for key in given], tokenizer, "logit_bias")
    return {int(key): value for key, value in given.items()}


def _stops(asked: Asked) -> list[str]:
    return [asked.stop] if isinstance(asked.stop, str) else asked.stop or []


def _scored(ask: Ask) -> list[Ask]:
    """An ask for each copy, which scores the prompt by itself: copies would share one reading of the prompt."""
    seed = ask.sampling.seed
    return [
        Ask(ask.prompt, ask.sampling.model_copy(update={"seed": None if seed is None else _shifted(seed, copy)}), "score", ask.priority)
        for copy in range(ask.copies)
    ]


def _shifted(seed: int, copy: int) -> int:
    """The seed of a copy, as the engine has it: in 64 bits with a sign."""
    return (seed + copy + (1 << 63)) % (1 << 64) - (1 << 63)
