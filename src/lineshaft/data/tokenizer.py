"""TRAIN_TOKENIZER: a byte-level BPE from the training part of a corpus, in files that transformers loads as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers

from lineshaft.base.config import Config
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import bar, say
from lineshaft.records.corpus import read_corpus
from lineshaft.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, byte_alphabet

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
"""Ids 0, 1 and 2: document begin, document end, and a filler that no loss ever sees."""

WORD_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*\n+|\s+(?!\S)|\s+"
"""Merges stay inside one of these: a word with the space before it, up to three digits, symbols, line ends, indentation."""

SAMPLE_BYTES = 1 << 20

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('role "' ~ message.role ~ '" is unknown: use system, user or assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""Plain text, so that a model which has only ever read documents can follow it."""


class TokenizerConfig(Config):
    """How large a vocabulary, and what may enter it."""

    vocab_size: int = Field(default=2048, ge=259, le=1 << 20)
    """Tokens, the 256 bytes and 3 special ones included. A small corpus may give fewer."""
    min_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to become a token."""


def train(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """The byte-level BPE of these texts. Equal texts in equal order give equal bytes."""
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(byte_alphabet()),  # all of it, so that no text is unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _build(draft: Draft, config: TokenizerConfig) -> None:
    corpus = draft.parents["corpus"]
    with bar("documents", corpus.manifest.facts["splits"]["train"]["documents"]) as progress:

        def texts() -> Iterator[str]:
            for document in read_corpus(corpus, "train"):
                progress.advance()
                yield document.text

        trained = train(texts(), config)
    (draft.root / TOKENIZER_FILE).write_text(trained.to_str(pretty=True) + "\n", encoding="utf-8")
    (draft.root / CONFIG_FILE).write_text(json.dumps(_description(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(draft.root)
    if tokenizer.vocab_size < config.vocab_size:
        say(
            f"the text gives {tokenizer.vocab_size} of the {config.vocab_size} tokens asked for: "
            f"no other pair occurs {config.min_frequency} times"
        )
    draft.facts |= {"vocab_size": tokenizer.vocab_size, "bytes_per_token": round(_bytes_per_token(tokenizer, corpus), 4)}


def _description() -> dict[str, Any]:
    """tokenizer_config.json, as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _bytes_per_token(tokenizer: Tokenizer, corpus: Artifact) -> float:
    """UTF-8 bytes that a token stands for on average, in the first held-out documents."""
    sample: list[str] = []
    size = 0
    for document in read_corpus(corpus, "heldout"):
        sample.append(document.text)
        size += len(document.text.encode())
        if size >= SAMPLE_BYTES:
            break
    return size / sum(map(len, tokenizer.encode_batch(sample)))


TRAIN_TOKENIZER = Stage(
    name="train_tokenizer",
    kind="tokenizer",
    version=1,
    config=TokenizerConfig,
    build=_build,
    parents={"corpus": "corpus"},
)
