"""What requests and steps enter into the metrics. Counters go on when an engine is restarted, whose own totals begin anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.sched.load import Load
from lineshaft.serve.metrics import Metrics

_TOTALS = {
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "prefix_queried_tokens",
    "vllm:prefix_cache_hits": "prefix_hit_tokens",
}
"""Counter to the total that the engine keeps."""


@dataclass
class Times:
    """When what happened to one request, on the monotonic clock in seconds; None: not yet."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0


class Ledger:
    """Enters everything that happens into one server's metrics."""

    def __init__(self, metrics: Metrics, waiting: Callable[[], int]) -> None:
        """`waiting`: how many requests wait for a first step."""
        self._metrics = metrics
        self.load = Load()
        """How busy the engine was after its last step."""
        self._engine_process: int | None = None
        for reason in ("stop", "length", "abort", "error"):  # seen as 0 from the start: the first of a kind shows in a rate, too
            metrics.count("vllm:request_success", 0, finished_reason=reason)
        metrics.follow("vllm:num_requests_waiting", waiting)
        metrics.follow("vllm:num_requests_running", lambda: self.load.running)
        metrics.follow("vllm:kv_cache_usage_perc", lambda: self.load.cache_usage)
        metrics.follow("lineshaft:admission_limit", lambda: self.load.admission_limit)
        metrics.follow("lineshaft:resident_memory_bytes", resident_memory_bytes, process="front")
        metrics.follow("lineshaft:resident_memory_bytes", self._engine_memory, process="engine")

    def started(self, times: Times, began: float, prompt_tokens: int) -> None:
        """A step that began then was the first to work on a request."""
        times.started = max(began, times.arrived)
        self._metrics.observe("vllm:request_queue_time_seconds", times.started - times.arrived)
        self._metrics.observe("vllm:request_prompt_tokens", prompt_tokens)
        self._metrics.count("vllm:prompt_tokens", prompt_tokens)

    def token(self, times: Times, now: float) -> None:
        """A request got a token."""
        if times.last_token is None:
            times.first_token = now
            self._metrics.observe("vllm:time_to_first_token_seconds", now - times.arrived)
            self._metrics.observe("vllm:request_prefill_time_seconds", now - (times.started or times.arrived))
        else:
            self._metrics.observe("vllm:inter_token_latency_seconds", now - times.last_token)
        times.last_token = now
        times.tokens += 1

    def ended(self, times: Times, reason: str) -> None:
        """A request is over: stop, length, abort or error."""
        self._metrics.count("vllm:request_success", finished_reason=reason)
        if reason in ("stop", "length") and times.last_token is not None and times.first_token is not None:
            self._metrics.observe("vllm:e2e_request_latency_seconds", times.last_token - times.arrived)
            self._metrics.observe("vllm:request_decode_time_seconds", times.last_token - times.first_token)
            self._metrics.observe("vllm:request_generation_tokens", times.tokens)

    def stepped(self, load: Load, tokens: int) -> None:
        """A step gave so many tokens and left the engine as busy as `load` says."""
        before, self.load = self.load, load
        if load.busy_seconds > before.busy_seconds:
            self._metrics.count("lineshaft:engine_busy_seconds", load.busy_seconds - before.busy_seconds)
            self._metrics.observe("vllm:iteration_tokens_total", load.step_tokens)
            self._metrics.observe("lineshaft:batch_size", load.step_requests)
        for counter, total in _TOTALS.items():
            if (more := getattr(load, total) - getattr(before, total)) > 0:
                self._metrics.count(counter, more)
        self._metrics.count("vllm:generation_tokens", tokens)

    def loaded(self, again: bool, process: int | None = None) -> None:
        """A fresh engine takes over, with totals of zero."""
        self.load, self._engine_process = Load(), process
        if again:
            self._metrics.count("lineshaft:engine_restarts")

    def lost(self) -> None:
        """There is no engine now."""
        self.load, self._engine_process = Load(), None

    def _engine_memory(self) -> int:
        return 0 if self._engine_process is None else resident_memory_bytes(self._engine_process)
