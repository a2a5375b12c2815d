"""The line in miniature: a tokenizer of letters, a synthetic text that can be learnt, a model that trains in a second.

Used by the tests of train and of evaluate.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.model.config import Architecture, LatentAttention, MixtureOfExperts
from lineshaft.records.tokens import write_split
from lineshaft.train.loop import LoopConfig
from lineshaft.train.stage import TrainConfig

BOS, EOS, LETTERS = 0, 1, 26
VOCABULARY = 2 + LETTERS

TINY = Architecture(
    family="deepseek_v3",
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=32,
    max_position_embeddings=64,
    attention=LatentAttention(num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8),
    moe=MixtureOfExperts(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=16, first_k_dense_replace=1),
)


def config(**changes: Any) -> TrainConfig:
    """A run of 12 short steps; states after 4 and 8. `changes` may name fields of the loop."""
    loop = {"steps": 12, "precision": "float32", "save_every": 4, "log_every": 2}
    loop |= {name: changes.pop(name) for name in list(changes) if name in LoopConfig.model_fields}
    return TrainConfig.model_validate({"model": TINY, "sequence_tokens": 16, "rows": 2, "loop": LoopConfig.model_validate(loop), **changes})


def documents(seed: int, count: int) -> list[list[int]]:
    """Each letter is followed by one of three, always the same three: far below the entropy of single letters."""
    luck = random.Random(seed)
    texts = []
    for _ in range(count):
        text = [luck.randrange(LETTERS)]
        while len(text) < 40 and luck.random() > 0.03:
            text.append((text[-1] * 5 + luck.randrange(3)) % LETTERS)
        texts.append([BOS, *(2 + letter for letter in text), EOS])
    return texts


def tokenizer(store: Store, version: int = 1) -> Artifact:
    """One token a letter; other versions are other tokenizers."""
    with store.draft("tokenizer", stage="by_hand", version=version, config={}) as draft:
        if isinstance(draft, Draft):
            vocabulary = {"<s>": BOS, "</s>": EOS, **{chr(ord("a") + place): 2 + place for place in range(LETTERS)}}
            letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=version > 1))
            letters.add_special_tokens(["<s>", "</s>"])
            letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            letters.save(str(draft.root / "tokenizer.json"))
            (draft.root / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return _only(store, "tokenizer", version)


def tokens(store: Store, letters: Artifact, train: list[list[int]], heldout: list[list[int]], version: int = 1) -> Artifact:
    """Token shards of these documents, as the data stages would write them."""
    with store.draft("tokens", stage="by_hand", version=version, config={}, parents={"tokenizer": letters}) as draft:
        if isinstance(draft, Draft):
            for split, texts in (("train", train), ("heldout", heldout)):
                counts = write_split(draft, split, iter(texts), VOCABULARY)
                draft.facts[split] = counts | {"bytes": sum(len(text) - 2 for text in texts)}
            draft.facts |= {"vocab_size": VOCABULARY, "bos_id": BOS, "eos_id": EOS}
            draft.facts["tokenizer_sha256"] = hashlib.sha256(letters.path("tokenizer.json").read_bytes()).hexdigest()
    return _only(store, "tokens", version, letters)


def parents(folder: Path) -> tuple[Store, dict[str, Artifact]]:
    """A store at `folder` with tokenizer and tokens; called again, the same ones."""
    store = Store(folder)
    letters = tokenizer(store)
    return store, {"tokenizer": letters, "tokens": tokens(store, letters, documents(1, 120), documents(2, 60))}


def _only(store: Store, kind: str, version: int, parent: Artifact | None = None) -> Artifact:
    wanted = {"tokenizer": parent.id} if parent else {}
    asked = (kind, "by_hand", version, wanted)
    (found,) = (item.id for item in store.all() if (item.kind, item.stage, item.version, item.parents) == asked)
    return store.open(found)
