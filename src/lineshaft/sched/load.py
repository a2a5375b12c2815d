"""How busy an engine is: what the server shows as metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """One moment of an engine. Totals count from its start."""

    running: int = 0
    """Requests being worked on."""
    waiting: int = 0
    """Requests taken in but not worked on."""
    cache_usage: float = 0.0
    """Share of cache pages that requests hold, 0 to 1; pages kept only for their prefix can be taken and do not count."""
    admission_limit: int = 0
    """Requests that may be worked on at once now."""
    step_tokens: int = 0
    """Tokens in the last step."""
    preemptions: int = 0
    """Total of requests that had to give up their pages."""
    prefix_queried_tokens: int = 0
    """Total of prompt tokens that were looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Total of those that were found."""
    step_requests: int = 0
    """Requests in the last step."""
    step_began: float = 0.0
    """When the last step began, on the engine's clock, in seconds."""
    busy_seconds: float = 0.0
    """Total time in steps."""
