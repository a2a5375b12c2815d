"""What the server lets in: sizes, counts and times of one request, and what each refusal is called."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from lineshaft.base.config import Config


class Limits(Config):
    """Bounds on one request. How many requests may wait is the worker's own limit."""

    max_body_bytes: PositiveInt = 4 << 20
    """Larger request bodies are refused with 413."""
    max_request_tokens: PositiveInt | None = None
    """Most tokens of prompts and answers together that one request may ask for, over all its choices; more are refused with 413. null:
    only the model's context bounds each choice."""
    max_choices: PositiveInt = 64
    """Most answers (prompts times `n`) in one request; more are refused with 400."""
    max_inputs: PositiveInt = 2048
    """Most texts in one request for embeddings; more are refused with 400."""
    body_seconds: PositiveFloat = 30.0
    """A body must have arrived by then; else 408."""
    request_seconds: PositiveFloat = 600.0
    """An answer must be complete by then, counted from the request's arrival; else 408, or an error event in a stream that has begun."""
