"""How large the cache is: pages for each layer group, and the longest text that they allow. No trial run: it is arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lineshaft.base.errors import ConfigError
from lineshaft.engine.cache import groups_of, page_bytes
from lineshaft.engine.cache_dtype import cache_dtype
from lineshaft.engine.config import EngineConfig
from lineshaft.model.config import ModelConfig

DEFAULT_BYTES = 512 << 20
"""Cache of an engine that is told neither a size nor what is left beside the weights."""


@dataclass(frozen=True)
class Pool:
    """The cache of one engine."""

    pages: list[int]
    """Of each layer group."""
    context_tokens: int
    """Most tokens of prompt and answer: what the settings allow, or what the pages hold, whichever is less."""
    size: int
    """Bytes, with the page of zeros of each group."""


def context_of(model: ModelConfig, config: EngineConfig) -> int:
    """Most tokens of prompt and answer that the settings allow, if the cache holds them."""
    return min(config.max_context or model.max_position_embeddings, model.max_position_embeddings)


def pool_of(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> Pool:
    """For a model of this dtype, as many pages as cache_bytes allows, or fewer when that many could never be used at once.

    A request holds most_g pages of group g at most; with room for x such requests each group gets x * most_g pages. Where
    not even one whole context fits, the pages are those of the longest text that does. ConfigError when that is not one page,
    or pages can't be held as the settings want.
    """
    dtype = cache_dtype(model, config, dtype)
    groups, context = groups_of(model), context_of(model, config)
    one_page = [page_bytes(model, config.page_tokens, dtype, len(group.layers)) for group in groups]
    budget = config.cache_bytes or DEFAULT_BYTES

    def needed(tokens: int) -> list[int]:
        return [group.most_pages(tokens, config.scheduler.step_tokens, config.page_tokens) for group in groups]

    def size(pages: list[int]) -> int:
        return sum(count * page for count, page in zip(pages, one_page, strict=True))

    if size(needed(config.page_tokens)) > budget:
        raise ConfigError(f"cache_bytes {budget} is less than one page of {sum(one_page)} bytes: raise it, or lower page_tokens")
    whole = needed(context)
    if size(whole) <= budget:
        pages = [min(config.scheduler.max_batch * most, budget * most // size(whole)) for most in whole]
    else:
        held = _largest(lambda count: size(needed(count * config.page_tokens)) <= budget, context // config.page_tokens)
        context, pages = held * config.page_tokens, needed(held * config.page_tokens)
    return Pool(pages, context, size(pages) + sum(one_page))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
