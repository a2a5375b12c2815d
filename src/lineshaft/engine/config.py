"""What can be set about one engine. Free of torch: whoever only passes settings on does not load it."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from lineshaft.base.config import Config
from lineshaft.sched.admission import SchedulerConfig


class EngineConfig(Config):
    """Precision, memory and limits of one engine."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dense weights, and the cache unless cache_dtype says otherwise, are held as this; auto: as the checkpoint stores them."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """What the cache's keys and values are held as; auto: as the model's dtype. int8: codes with a scale for 64 channels, about half
    the bytes of bfloat16; needs the native kernels and batch_invariant."""
    activations: Literal["auto", "int8"] = "auto"
    """What meets integer weights; auto: what the checkpoint says. int8: activations rounded to 8 bits, a scale a token, in all such
    products but the output projection's: prompts run faster, and numbers are no longer those of the checkpoint."""
    dequantise: bool = False
    """Decode quantised weights (INT8, FP8) once, when they are loaded: more memory, but no decoding in each product."""
    active_experts: PositiveInt | None = None
    """Experts that a token uses; null: as many as the model was made for."""
    page_tokens: PositiveInt = 16
    """Tokens in a cache page. Larger pages waste tails; smaller ones cost look-ups."""
    cache_bytes: PositiveInt | None = None
    """Most memory for the cache; less is taken when max_batch full contexts need less. Null: half of what the preflight finds left
    beside weights and activations (an engine around a model that is loaded already: 512 MiB)."""
    max_context: PositiveInt | None = None
    """Most tokens of prompt and answer; null: what the model was made for."""
    batch_invariant: bool = True
    """A request's numbers are the same bits alone and in any company, in one go or in chunks, from the cache or not (on processors).
    False: products and attention as fast as PyTorch has them, whose last bits depend on the batch."""
    keep_start: Literal["weights", "program", "nothing"] = "weights"
    """What the first start of a server leaves in the user's cache folder, so that the next one with the same checkpoint and settings is
    ready sooner (docs/serving.md). weights: all that it worked out, as large as the model; program: only what can't be made from the
    checkpoint again, little where weights are dense; nothing: nor is anything used."""
    scheduler: SchedulerConfig = SchedulerConfig()
