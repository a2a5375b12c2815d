"""What a model writes when it is to go on with held-out documents: the prompts, and the texts out of the tokens it wrote.

The prompts depend on the tokens and the settings alone, so every model on the same tokens gets the same ones. The engine
that serves goes on with them, greedily, in the process that measured its speed (`evaluate/speed.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from lineshaft.base.config import Config
from lineshaft.evaluate.speed import Answer
from lineshaft.records.generations import Generation
from lineshaft.records.tokens import TokenStream
from lineshaft.text.tokenizer import Tokenizer

HALF = "\ufffd"
"""What a character that was cut in two is shown as."""
LONGEST_CHARACTER = 4
"""Tokens that a character takes at most: one for each of its UTF-8 bytes."""


class GenerateConfig(Config):
    """How a model is to go on with held-out text."""

    prompts: int = Field(32, ge=0, le=4096)
    """Held-out documents whose beginning is a prompt, spread over all that are long enough; 0: none, and no texts are compared."""
    prompt_tokens: PositiveInt = 32
    """Tokens of a prompt. Where that would cut a character in two it ends before it."""
    output_tokens: PositiveInt = 32
    """Most tokens to write. Longer texts drift further apart, whatever the model."""

    @field_validator("prompts")
    @classmethod
    def _enough(cls, prompts: int) -> int:
        if prompts == 1:
            raise ValueError("one prompt leaves no interval: take 2 or more, or 0 for none")
        return prompts

    @property
    def most_tokens(self) -> int:
        """Tokens that a prompt and its answer take at most; 0 when there are none."""
        return self.prompt_tokens + self.output_tokens if self.prompts else 0


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document, and how it goes on."""

    document: int
    ids: list[int]
    truth: list[int]


def prompts_of(stream: TokenStream, config: GenerateConfig, words: Tokenizer) -> list[Prompt]:
    """The prompts in the order of their documents; none where fewer than two documents are long enough for prompt and truth."""
    starts_D = stream.starts()
    long_D = np.flatnonzero(np.diff(starts_D, append=len(stream)) > config.prompt_tokens + config.output_tokens)  # the last is an end token
    count = min(config.prompts, len(long_D))
    if count < 2:
        return []
    chosen = long_D[np.arange(count) * len(long_D) // count]
    return [_prompt(stream, int(document), int(starts_D[document]), config, words) for document in chosen]


def _prompt(stream: TokenStream, document: int, start: int, config: GenerateConfig, words: Tokenizer) -> Prompt:
    ids = stream.read(start, start + config.prompt_tokens + config.output_tokens).tolist()
    size = config.prompt_tokens
    shortest = max(1, size - LONGEST_CHARACTER + 1)
    cut = next((end for end in range(size, shortest - 1, -1) if not words.decode(ids[:end]).endswith(HALF)), size)
    return Prompt(document, ids[:cut], ids[cut : cut + config.output_tokens])


def generations_of(prompts: Sequence[Prompt], answers: Sequence[Answer], words: Tokenizer) -> list[Generation]:
    """Each prompt with its answer, as texts."""
    return [
        Generation(
            document=prompt.document,
            prompt_ids=prompt.ids,
            prompt=words.decode(prompt.ids),
            truth=_text(words, prompt.truth),
            ids=answer.ids,
            text=_text(words, answer.ids[:-1] if answer.finish == "stop" else answer.ids),
            finish_reason=answer.finish,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _text(words: Tokenizer, ids: Sequence[int]) -> str:
    """Without a character that the last token only began."""
    return words.decode(ids).rstrip(HALF)
