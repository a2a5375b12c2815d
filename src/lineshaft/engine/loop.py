"""The engine: submit requests, call `step` until they are done.

plan   which tokens run now (sched, no torch)
run    the model over them, through the paged cache
sample a token for each request that is due one
commit the tokens; requests that end leave, their pages are free
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from lineshaft.base.errors import ConfigError, RequestError, TooLong
from lineshaft.engine.cache import PagedCache, page_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.runner import Runner
from lineshaft.engine.sampler import Sampler
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.sched.load import Load
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import Ask, Event, Request
from lineshaft.sched.scheduler import Scheduler


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model, self.config = model, config
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        context, pages = context_of(model.config, config), cache_pages(model.config, config, dtype)
        self.context_tokens = min(context, pages * config.page_tokens)
        """Most tokens of prompt and answer: what the model was made for, max_context, or the whole cache, whichever is least."""
        self._more_cache = "; a larger cache_bytes would allow more" if self.context_tokens < context else ""
        self.scheduler = Scheduler(config.scheduler, PagePool(pages), config.page_tokens)
        self.runner = Runner(model, PagedCache(model.config, pages, config.page_tokens, dtype))
        self.sampler = Sampler()
        self._numbers = count(1)

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> Engine:
        """An engine for the checkpoint in a Hugging Face folder. Raises ModelError for what can't be served."""
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        return cls(load_checkpoint(folder, dtype=dtype, dequantise=config.dequantise, active_experts=config.active_experts), config)

    def submit(self, ask: Ask) -> list[int]:
        """Queue a prompt; returns a number for each copy.

        Raises RequestError for a prompt that is empty or holds ids outside the vocabulary, TooLong, CacheFull, QueueFull.
        """
        prompt, sampling = ask.prompt, ask.sampling
        vocabulary = self.model.config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: it must hold at least one token", "prompt")
        if bad := [token for token in prompt if not 0 <= token < vocabulary]:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {vocabulary}", "prompt")
        if len(prompt) + sampling.max_tokens > self.context_tokens:
            raise TooLong(
                f"{len(prompt)} prompt tokens and {sampling.max_tokens} to produce exceed the context of {self.context_tokens} tokens: "
                f"shorten the prompt or lower max_tokens{self._more_cache}",
                "max_tokens" if len(prompt) < self.context_tokens else "prompt",
            )
        ends = frozenset() if sampling.ignore_eos else frozenset(self.model.config.eos_token_ids)
        request = Request(next(self._numbers), len(prompt), sampling, ends | frozenset(sampling.stop_token_ids), list(prompt))
        self.scheduler.submit(request)
        return [request.number]

    def cancel(self, request: int) -> None:
        """Forget a request and free its pages now; a number that has ended already is ignored."""
        self.scheduler.cancel(request)
        self.sampler.forget(request)

    def step(self) -> Sequence[Event]:
        """Plan, run, sample, commit: the whole engine. [] when there is nothing to do."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return []
        logits_RV = self.runner.run(plan)
        tokens = self.sampler(logits_RV, plan.sampling)
        emitted = self.scheduler.commit(plan, tokens)
        for token in emitted:
            if token.finish is not None:
                self.sampler.forget(token.request)
        return emitted

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    def load_now(self) -> Load:
        """How busy it is."""
        pool = self.scheduler.pool
        return Load(len(self.scheduler.running), len(self.scheduler.waiting), 1 - pool.free / pool.pages)


def context_of(model: ModelConfig, config: EngineConfig) -> int:
    """Most tokens of prompt and answer that the settings allow, if the cache holds them."""
    return min(config.max_context or model.max_position_embeddings, model.max_position_embeddings)


def cache_pages(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """Pages that cache_bytes allows, or fewer when that many could never be used at once. ConfigError when it is not even one."""
    wanted = config.scheduler.max_batch * -(-context_of(model, config) // config.page_tokens)
    page = page_bytes(model, config.page_tokens, dtype)
    if config.cache_bytes < page:
        raise ConfigError(f"cache_bytes {config.cache_bytes} is less than one page of {page} bytes: raise it, or lower page_tokens")
    return min(wanted, config.cache_bytes // page)
