"""A folder with a model for those who have none at hand: `half` is a random llama of 0.53 G weights in bf16, made in a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder

HALF = {
    "family": "llama",
    "hidden_size": 1280,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "attention": {"kind": "gqa", "num_attention_heads": 20, "num_key_value_heads": 10, "head_dim": 64},
}


@contextmanager
def folder_of(name: str) -> Iterator[Path]:
    """The folder of that name, or a new one while the context lasts."""
    if name != "half":
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Decoder(ModelConfig.model_validate(HALF))
        model.initialise(1)
        save_checkpoint(model.to(torch.bfloat16), Path(folder), Path(folder))
        del model
        yield Path(folder)
