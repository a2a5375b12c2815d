"""As what the cache's pages are held: numbers of the model's dtype, or 8-bit codes with scales."""

from __future__ import annotations

import torch

from lineshaft.base.errors import ConfigError
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.native_attend import obstacle
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.cost import kv_bytes


def cache_dtype(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """For a model of this dtype; int8 stands for codes with scales (ops/entries.py).

    Raises ConfigError where nothing could read them: only the native kernels can, and nobody is to be served otherwise in silence.
    """
    if config.cache_dtype == "auto":
        return dtype
    missing = obstacle(model)
    if isinstance(model.attention, LatentAttention) and model.attention.indexer is not None:
        missing = "this model's indexer can't choose among codes"
    if not config.batch_invariant:
        missing = "the native kernels, which read 8-bit pages, need engine.batch_invariant=true"
    elif dtype not in (torch.float32, torch.bfloat16):
        missing = f"the native kernels work on float32 and bfloat16, not on {dtype}: set engine.dtype"
    if missing:
        raise ConfigError(f"engine.cache_dtype=int8: {missing}; engine.cache_dtype=auto works without it")
    return torch.int8


def told(model: ModelConfig) -> str:
    """Of a coded cache, for whoever starts the server."""
    coded, plain = (model.num_hidden_layers * kv_bytes(model, held) for held in ("int8", "bfloat16"))
    return f"cache pages hold 8-bit codes with scales: {coded} bytes a token (as bfloat16: {plain})"
