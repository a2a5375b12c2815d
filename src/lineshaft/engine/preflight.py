"""What serving a model needs in memory, told before its weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lineshaft.base.machine import available_memory_bytes, resident_memory_bytes
from lineshaft.engine.cache import page_bytes
from lineshaft.engine.cache_dtype import cache_dtype
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.page_memory import CACHE_SHARE
from lineshaft.engine.pool import DEFAULT_BYTES, context_of, pool_of
from lineshaft.engine.tiles import working_bytes
from lineshaft.model.config import ModelConfig
from lineshaft.model.fit import Step, Verdict, halved, judge
from lineshaft.model.folder import load_config
from lineshaft.model.memory import ITEM, Memory, Stored, one_pass, stored_in

CODE_BYTES = 24 << 20
"""Code and buffers of PyTorch's math libraries that come into memory with the first products (docs/preflight.md)."""
HOLES = 0.75
"""Share of a step's activations that lies unused in the heap, since steps of other sizes left other blocks (docs/preflight.md)."""
LEAST_TOKENS = 512
"""No shorter context is proposed."""
_SAMPLING_BYTES = 40
"""For each entry of one row of logits, by PyTorch: scaled, sorted with their places, summed up, made into chances.

The native kernel takes 8 a thread."""


@dataclass(frozen=True)
class Serving:
    """What is to be served, and how."""

    model: ModelConfig
    stored: Stored
    """As the files hold it."""
    engine: EngineConfig

    @property
    def held(self) -> Stored:
        """As it is held in memory."""
        held = self.stored if self.engine.dtype == "auto" else self.stored.cast(self.engine.dtype)
        return replace(held, format="dense", in_files=None) if self.engine.dequantise and held.format != "dense" else held


def serve_memory(given: Serving) -> Memory:
    """Loading, then a step as large as the scheduler makes them, over a cache that is full."""
    config, held = _with_active_experts(given.model, given.engine.active_experts), given.held
    dtype = getattr(torch, held.dtype)
    pool, limits = pool_of(config, given.engine, dtype), given.engine.scheduler
    context, pages = pool.context_tokens, max(pool.pages)
    requests = min(limits.max_batch, pages)
    tokens = min(limits.step_tokens, pages * given.engine.page_tokens, requests * context)
    weights = {"weights": held.total(config)}
    loading = weights | ({"weights as stored, until they are converted": given.stored.total(config)} if held != given.stored else {})
    logits = requests * config.vocab_size * (ITEM[held.dtype] + (4 if held.dtype != "float32" else 0))
    activations = one_pass(config, held, held.dtype, tokens, context)
    tiles = working_bytes(config, context) if given.engine.batch_invariant else 0
    running = weights | {
        "cache pages": pool.size,
        f"activations of {tokens} tokens": activations,
        "holes in the heap": int(HOLES * activations),
        "attention in tiles": tiles,
        "logits": logits + _SAMPLING_BYTES * config.vocab_size,
    }
    return Memory({"loading": loading, "running": running})


def _with_active_experts(config: ModelConfig, count: int | None) -> ModelConfig:
    if config.moe is None or count is None:
        return config
    return config.model_copy(update={"moe": config.moe.model_copy(update={"num_experts_per_tok": count})})


def with_cache(given: Serving, room: int | None = None) -> Serving:
    """With cache_bytes settled: where it is null, half of what is left in `room` (None: of this machine's memory) beside all else."""
    if given.engine.cache_bytes is not None:
        return given
    least = replace(given, engine=given.engine.model_copy(update={"cache_bytes": DEFAULT_BYTES}))
    config, dtype = given.model, getattr(torch, given.held.dtype)
    others = serve_memory(least).total - pool_of(config, least.engine, dtype).size
    left = (available_memory_bytes() if room is None else room) - resident_memory_bytes() - CODE_BYTES - others
    size = int(CACHE_SHARE * left)
    enough = size >= 2 * page_bytes(config, given.engine.page_tokens, cache_dtype(config, given.engine, dtype))
    return replace(given, engine=given.engine.model_copy(update={"cache_bytes": size})) if enough else least


def judge_serving(given: Serving, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    given = with_cache(given, room)
    ladders = (_smaller_cache, _smaller_steps, _smaller_batch, _as_stored, _bfloat16, _int8, _shorter_context)
    return judge("serve", given, ladders, serve_memory, resident_memory_bytes() + CODE_BYTES, room)


def check_room(folder: Path, engine: EngineConfig) -> EngineConfig:
    """The settings with cache_bytes settled. Raises DoesNotFit when serving the checkpoint would need more memory than there is."""
    given = with_cache(Serving(load_config(folder), stored_in(folder), engine))
    judge_serving(given).enforce()
    return given.engine


def _smaller_cache(given: Serving) -> Iterator[Step[Serving]]:
    dtype = getattr(torch, given.held.dtype)
    one_request = _context_bytes(given, context_of(given.model, given.engine))
    used = pool_of(given.model, given.engine, dtype).size
    for size in halved(min(used, given.engine.cache_bytes or used), one_request):
        engine = given.engine.model_copy(update={"cache_bytes": size})
        yield f"engine.cache_bytes={size}", replace(given, engine=engine)


def _context_bytes(given: Serving, tokens: int) -> int:
    """Cache that one request of so many tokens takes, when every layer sees all."""
    page = page_bytes(given.model, given.engine.page_tokens, cache_dtype(given.model, given.engine, getattr(torch, given.held.dtype)))
    return page * -(-tokens // given.engine.page_tokens)


def _smaller_steps(given: Serving) -> Iterator[Step[Serving]]:
    for tokens in halved(given.engine.scheduler.step_tokens, 64):
        yield _scheduled(given, "step_tokens", tokens)


def _smaller_batch(given: Serving) -> Iterator[Step[Serving]]:
    for requests in halved(given.engine.scheduler.max_batch, 1):
        yield _scheduled(given, "max_batch", requests)


def _scheduled(given: Serving, name: str, value: int) -> Step[Serving]:
    scheduler = given.engine.scheduler.model_copy(update={name: value})
    return f"engine.scheduler.{name}={value}", replace(given, engine=given.engine.model_copy(update={"scheduler": scheduler}))


def _as_stored(given: Serving) -> Iterator[Step[Serving]]:
    if given.engine.dequantise and given.stored.format != "dense":
        yield "engine.dequantise=false", replace(given, engine=given.engine.model_copy(update={"dequantise": False}))


def _bfloat16(given: Serving) -> Iterator[Step[Serving]]:
    if given.held.dtype == "float32":
        yield "engine.dtype=bfloat16", replace(given, engine=given.engine.model_copy(update={"dtype": "bfloat16"}))


def _int8(given: Serving) -> Iterator[Step[Serving]]:
    if given.stored.format == "dense":
        yield "compress it to int8 first (lineshaft compress)", replace(given, stored=replace(given.stored, format="int8", in_files=None))


def _shorter_context(given: Serving) -> Iterator[Step[Serving]]:
    for tokens in halved(context_of(given.model, given.engine), LEAST_TOKENS):
        changed = given.engine.model_copy(update={"max_context": tokens})
        least = _context_bytes(given, tokens)
        size = min(changed.cache_bytes or DEFAULT_BYTES, max(least, least * changed.scheduler.max_batch))
        yield f"engine.max_context={tokens}", replace(given, engine=changed.model_copy(update={"cache_bytes": size}))
