"""TRAIN_TOKENIZER: a byte-level BPE from the training part of a corpus, in files that transformers loads as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers
from pydantic import Field, model_validator
from tokenizers import decoders, models, pre_tokenizers, trainers

from lineshaft.base.config import Config
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import bar, say
from lineshaft.records.corpus import read_corpus
from lineshaft.text import contract
from lineshaft.text.bundled import BUNDLED, TemplateName, source
from lineshaft.text.cuts import CUTS, Cut
from lineshaft.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, byte_alphabet

SAMPLE_BYTES = 1 << 20


class TokenizerConfig(Config):
    """How large a vocabulary, and what may enter it."""

    vocab_size: int = Field(default=2048, ge=259, le=1 << 20)
    """Tokens, the 256 bytes and those of the chat template included (3 for `plain`). A small corpus may give fewer."""
    min_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to become a token."""
    cut: Cut = "words"
    """Where no token may cross: our own pattern, or that of a published tokenizer, which llama.cpp knows (GGUF, text/cuts.py)."""
    chat_template: TemplateName = "plain"
    """How messages become one text. Its tokens for the beginning and end of a text are those of documents, too."""

    @model_validator(mode="after")
    def _has_room(self) -> TokenizerConfig:
        least = 256 + len(BUNDLED[self.chat_template].tokens)
        if self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least}: 256 bytes and the tokens of chat_template {self.chat_template}")
        return self


def train(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """The byte-level BPE of these texts. Equal texts in equal order give equal bytes."""
    bpe = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in CUTS[config.cut]]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    template = BUNDLED[config.chat_template]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(template.visible),
        min_frequency=config.min_frequency,
        special_tokens=[template.bos, template.eos, template.pad, *template.special],  # the first ids, in this order
        initial_alphabet=sorted(byte_alphabet()),  # all of it, so that no text is unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in template.visible])
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
    (draft.root / CONFIG_FILE).write_text(json.dumps(_description(config), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(draft.root)
    if tokenizer.vocab_size < config.vocab_size:
        say(
            f"the text gives {tokenizer.vocab_size} of the {config.vocab_size} tokens asked for: "
            f"no other pair occurs {config.min_frequency} times"
        )
    draft.facts |= contract.facts_of(draft.root)
    draft.facts |= {"vocab_size": tokenizer.vocab_size, "bytes_per_token": round(_bytes_per_token(tokenizer, corpus), 4)}


def _description(config: TokenizerConfig) -> dict[str, Any]:
    """tokenizer_config.json, as transformers reads it."""
    template = BUNDLED[config.chat_template]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": template.bos,
        "eos_token": template.eos,
        "pad_token": template.pad,
        "clean_up_tokenization_spaces": False,
        "chat_template": source(config.chat_template),
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
    version=2,
    config=TokenizerConfig,
    build=_build,
    parents={"corpus": "corpus"},
)
