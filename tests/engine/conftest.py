"""Tiny models with fresh random weights, wild enough that every token matters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import GroupedQueryAttention, Indexer, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.ops import isa
from lineshaft.ops.reach import Blocks, Window

for folder in ("model", "sched", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))  # pytest's importlib mode does not find helpers elsewhere

VOCABULARY = 61
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 96, "vocab_size": VOCABULARY}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPES = {
    "deepseek_v3": {
        "attention": LatentAttention(
            num_attention_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
        "moe": MixtureOfExperts(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1),
    },
    "deepseek_v32": {
        "attention": LatentAttention(
            num_attention_heads=2,
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            indexer=Indexer(num_heads=8, head_dim=8, top_k=7),
        ),
        "moe": MixtureOfExperts(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1),
    },
    "mistral": {"attention": GroupedQueryAttention(**_GQA), "reach": [Window(window=9)]},
    "llama": {
        "attention": GroupedQueryAttention(**_GQA),
        "reach": [Window(window=6, global_tokens=3), Blocks(block=4, local_blocks=2, stride=3)],
    },
    "qwen3_moe": {
        "attention": GroupedQueryAttention(**_GQA, qk_norm=True),
        "moe": MixtureOfExperts(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, scoring_func="softmax"),
    },
    "qwen3": {"attention": GroupedQueryAttention(**_GQA, qk_norm=True), "tie_word_embeddings": True},
}


@pytest.fixture
def pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(isa, "_library", None)
    monkeypatch.setattr(isa, "_tried", True)


def _tiny(family: str, **changes: object) -> Decoder:
    table = {"family": family, "initializer_range": 0.2, **_SIZES, **SHAPES[family], **changes}
    model = Decoder(ModelConfig.model_validate(table))
    model.initialise(5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Decoder]:
    """tiny(family, **config changes): a model of two layers; a new one each time, of the same weights."""
    return _tiny


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Decoder:
    """One of each kind of attention: latent, latent with an indexer, grouped with a window, with a mixture, with head norms."""
    return _tiny(request.param)


def _forward(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor(tokens), torch.arange(len(tokens)), PackedCausal([0], len(tokens))).float()


@pytest.fixture(scope="session")
def forward() -> Callable[[Decoder, list[int]], torch.Tensor]:
    """forward(model, tokens): logits of a plain pass over the whole text, no cache."""
    return _forward


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's starts are kept."""
    monkeypatch.setenv("LINESHAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
