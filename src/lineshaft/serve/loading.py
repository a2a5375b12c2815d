"""Loading an engine for the server: the one module of the serve package that needs torch, imported in the engine's process alone."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import torch

from lineshaft.engine import activations, cache_dtype
from lineshaft.engine.cache import page_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.preflight import check_room
from lineshaft.engine.starts.keep import Asked, keep
from lineshaft.engine.warm import told, tried
from lineshaft.model.cost import cost_of
from lineshaft.ops.isa import describe, follow_torch
from lineshaft.ops.table import chosen, steady
from lineshaft.serve.frames import Ready


def loaded(folder: Path, config: EngineConfig) -> tuple[Engine, Ready]:
    """The engine for a checkpoint, warm, and what the server is told of it.

    Raises DoesNotFit, ModelError, ConfigError.
    """
    follow_torch(torch.get_num_threads())
    began, asked = time.monotonic(), Asked.now(folder, config)  # before anything is read
    config = check_room(folder, config)  # first: it takes no time, and a model that does not fit is the commonest mistake
    engine = Engine.load(folder, config)
    loaded_at = time.monotonic()
    same, fingerprint = tried(engine)
    with steady(config.batch_invariant):
        kernels = ", ".join(f"{op} {origin}" for op, origin in chosen("cpu").items())
    weights = sum(tensor.nbytes for tensor in engine.model.state_dict().values())
    model, cache = engine.model, engine.runner.cache
    timing = f"loaded in {loaded_at - began:.1f} s, warm {time.monotonic() - loaded_at:.1f} s later"
    step = engine.runner.native
    held = [cache_dtype.told(model.config)] if cache.coded else []
    held += [activations.told(model)] if config.activations != "auto" else []
    lines = [describe(), *([step.told()] if step else []), *held, f"kernels: {kernels}", told(same), timing]
    ready = Ready(
        context_tokens=engine.context_tokens,
        weight_bytes=weights,
        bits_per_weight=8 * weights / cost_of(model.config).parameters,
        kv_bytes_per_token=float(page_bytes(model.config, 1, cache.dtype)),
        told=lines,
    )
    cache.get_ready()  # goes on beside the first requests, as does
    timeless = msgspec.structs.replace(ready, told=lines[:-1])
    keep(engine, asked, fingerprint, msgspec.to_builtins(timeless))
    return engine, ready
