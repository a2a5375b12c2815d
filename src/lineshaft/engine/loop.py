"""The engine: rounds of work (rounds.py) over a model that PyTorch holds.

from lineshaft.engine.loop import Engine
engine = Engine.load(folder, config)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from lineshaft.engine.activations import rounding
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.cache_dtype import cache_dtype
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.packing import leave_file, pack, packed_copy
from lineshaft.engine.pool import context_of, pool_of
from lineshaft.engine.preflight import check_room
from lineshaft.engine.rounds import Bounds, Rounds
from lineshaft.engine.runner import Runner
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder


class Engine(Rounds):
    """Continuous batching over one model. Not thread-safe: one thread owns it."""

    def __init__(self, model: Decoder, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: see Rounds."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        model = rounding(model, config)
        self.model = model = packed_copy(model) if config.batch_invariant else model
        pool, limits = pool_of(model.config, config, dtype), config.scheduler
        cache = PagedCache(model.config, pool.pages, config.page_tokens, cache_dtype(model.config, config, dtype))
        self.runner = Runner(model, cache, config.batch_invariant, limits.step_tokens, limits.max_batch, pool.context_tokens)
        bounds = Bounds(
            vocabulary=model.config.vocab_size,
            ends=frozenset(model.config.eos_token_ids),
            context_tokens=pool.context_tokens,
            cache_bound=pool.context_tokens < context_of(model.config, config),
        )
        super().__init__(bounds, config, cache, self.runner, clock)

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> Engine:
        """An engine for the checkpoint in a Hugging Face folder. Raises ModelError for what can't be served, DoesNotFit, ConfigError."""
        config = check_room(folder, config)
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        model = load_checkpoint(folder, dtype=dtype, dequantise=config.dequantise, active_experts=config.active_experts)
        model = rounding(model, config)
        if config.batch_invariant:
            pack(model)
            leave_file(model)
        return cls(model, config)
