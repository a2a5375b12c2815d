"""Small real-looking text, and the three artifacts made of it once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lineshaft.base.store import Artifact, Store
from lineshaft.data.ingest import INGEST, IngestConfig
from lineshaft.data.tokenizer import TRAIN_TOKENIZER, TokenizerConfig
from lineshaft.data.tokens import TOKENIZE, TokenizeConfig

ENGLISH = "The shaft turns every machine in the hall while the engine below keeps its own steady time and nobody hears"
CHINESE = "今天送来的饭菜很热味道也不错骑手态度特别好下次还会再点这家店谢谢老板辛苦了"


def _texts(count: int) -> list[str]:
    luck = random.Random(7)
    english = [" ".join(luck.choices(ENGLISH.split(), k=luck.randint(12, 40))).capitalize() + "." for _ in range(count)]
    chinese = ["".join(luck.choices(CHINESE, k=luck.randint(12, 40))) + "。" for _ in range(count)]
    return [text for pair in zip(english, chinese, strict=True) for text in pair]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 English and 200 Chinese documents as JSON Lines."""
    path = tmp_path_factory.mktemp("raw") / "notes.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(_texts(200))))
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def corpus(store: Store, jsonl: Path) -> Artifact:
    return INGEST(store, IngestConfig(source=str(jsonl), heldout_share=0.1))


@pytest.fixture(scope="session")
def tokenizer(store: Store, corpus: Artifact) -> Artifact:
    return TRAIN_TOKENIZER(store, TokenizerConfig(vocab_size=400), corpus=corpus)


@pytest.fixture(scope="session")
def tokens(store: Store, corpus: Artifact, tokenizer: Artifact) -> Artifact:
    return TOKENIZE(store, TokenizeConfig(shard_tokens=700), corpus=corpus, tokenizer=tokenizer)
