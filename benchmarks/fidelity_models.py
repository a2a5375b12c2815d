"""Three tiny models of different shapes, trained on the quickstart's text, for benchmarks/fidelity.py.

Every width that a weight is read along is a multiple of 128, so that all groups of the formats fit all layers. The store
keeps what was made, so a second run trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.base.store import Artifact, Store
from lineshaft.data.ingest import INGEST
from lineshaft.data.tokenizer import TRAIN_TOKENIZER
from lineshaft.data.tokens import TOKENIZE
from lineshaft.evaluate.bigram import Bigram
from lineshaft.model.config import Architecture
from lineshaft.pipeline.recipe import read_recipe
from lineshaft.records.tokens import TokenStream
from lineshaft.train.stage import PRETRAIN

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
STEPS = 1200
"""Two thirds of the quickstart's: enough to leave the bigram well behind."""

_SIZES = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 1024, "initializer_range": 0.05}
_GQA = {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_MLA = {
    "kind": "mla",
    "num_attention_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "num_hidden_layers": 3, "attention": _GQA},
    "qwen3_moe": {
        **_SIZES,
        "num_hidden_layers": 3,
        "attention": {**_GQA, "qk_norm": True},
        "moe": {**_EXPERTS, "scoring_func": "softmax", "n_shared_experts": 0},
    },
    "deepseek_v3": {**_SIZES, "num_hidden_layers": 3, "attention": _MLA, "moe": {**_EXPERTS, "first_k_dense_replace": 1}},
}
"""Family to the rest of its shape. The output projection is a layer of its own, so that it can be stored in fewer bits, too."""


@dataclass(frozen=True)
class Trained:
    """A model and text that it has not seen."""

    checkpoint: Artifact
    tokens: Artifact

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The first `length` tokens of up to `count` held-out documents, spread over all that are long enough.

        One piece a document, so that what is measured on them is independent.
        """
        stream = TokenStream(self.tokens, "heldout")
        starts = np.append(stream.starts(), len(stream))
        long = starts[:-1][np.diff(starts) >= length]
        chosen = long[np.linspace(0, len(long) - 1, min(count, len(long))).astype(int)]
        return [stream.read(int(first), int(first) + length).tolist() for first in chosen]

    def bigram_loss(self, rows: list[list[int]]) -> float:
        """Nats a token of the bigram of the training tokens on these rows."""
        bigram = Bigram(TokenStream(self.tokens, "train"), self.tokens.manifest.facts["vocab_size"])
        ids = np.array(rows)
        return -float(bigram.log_prob(ids[:, :-1].ravel(), ids[:, 1:].ravel()).mean())


def trained(store: Store, family: str, steps: int = STEPS, seed: int | None = None, **changes: Any) -> Trained:
    """The model of this shape, made now or before. In float32 on every machine, so that all train the same one.

    `seed`: of its weights and the order of the text, if not the quickstart's. `changes`: of its shape.
    """
    quick = read_recipe(QUICKSTART).recipe
    corpus = INGEST(store, quick.data)
    tokenizer = TRAIN_TOKENIZER(store, quick.tokenizer, corpus=corpus)
    tokens = TOKENIZE(store, quick.tokens, corpus=corpus, tokenizer=tokenizer)
    shape = Architecture.model_validate({"family": family, **SHAPES[family], **changes})
    loop = quick.train.loop.model_copy(update={"steps": steps, "precision": "float32"})
    config = quick.train.model_copy(update={"model": shape, "loop": loop, **({} if seed is None else {"seed": seed})})
    return Trained(PRETRAIN(store, config, tokens=tokens, tokenizer=tokenizer), tokens)
