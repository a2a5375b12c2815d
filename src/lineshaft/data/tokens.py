"""TOKENIZE: a corpus as token shards. Each document becomes bos + its ids + eos, in the corpus' order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

from pydantic import Field

from lineshaft.base.config import Config
from lineshaft.base.errors import UnsupportedModel
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import Bar, bar
from lineshaft.records.corpus import SPLITS, Document, read_corpus
from lineshaft.records.tokens import SHARD_TOKENS, write_split
from lineshaft.text.tokenizer import Tokenizer

DOCUMENTS_A_BATCH = 256


class TokenizeConfig(Config):
    """How the shards are cut."""

    shard_tokens: int = Field(default=SHARD_TOKENS, ge=1)
    """A shard ends with the first document that reaches this many tokens."""


def _build(draft: Draft, config: TokenizeConfig) -> None:
    corpus, tokenizer = draft.parents["corpus"], Tokenizer.load(draft.parents["tokenizer"].root)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UnsupportedModel(
            f"{draft.parents['tokenizer'].id}: names no bos_token or no eos_token, which mark where a document begins and ends"
        )
    split_counts = corpus.manifest.facts["splits"]
    with bar("documents", sum(counts["documents"] for counts in split_counts.values())) as progress:
        for split in SPLITS:
            ids = _encoded(read_corpus(corpus, split), tokenizer, progress)
            counts = write_split(draft, split, ids, tokenizer.vocab_size, config.shard_tokens)
            draft.facts[split] = counts | {"bytes": split_counts[split]["bytes"]}
    draft.facts |= {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    tokenizer_file = draft.parents["tokenizer"].path("tokenizer.json").read_bytes()
    draft.facts["tokenizer_sha256"] = hashlib.sha256(tokenizer_file).hexdigest()


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer, progress: Bar) -> Iterator[list[int]]:
    while batch := [document.text for document in islice(documents, DOCUMENTS_A_BATCH)]:
        for ids in tokenizer.encode_batch(batch):
            assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
            yield [tokenizer.bos_id, *ids, tokenizer.eos_id]
        progress.advance(len(batch))


TOKENIZE = Stage(
    name="tokenize",
    kind="tokens",
    version=1,
    config=TokenizeConfig,
    build=_build,
    parents={"corpus": "corpus", "tokenizer": "tokenizer"},
)
