"""How many requests are worked on at once: few while few wait, which answers each faster; more as they queue up.

The rule of dynamic batching, without what is wrong with waiting for a batch to fill up: a request joins the step that is
about to run, and one that has waited its time joins whatever the limit says, as long as the cap allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from lineshaft.base.config import Config

Preset = Literal["latency", "balanced", "throughput"]
PRESETS: Mapping[str, Mapping[str, int]] = {
    "latency": {"start_batch": 8, "max_batch": 32, "step_tokens": 256},
    "balanced": {"start_batch": 8, "max_batch": 64, "step_tokens": 512},
    "throughput": {"start_batch": 64, "max_batch": 64, "step_tokens": 1024},
}
"""What a preset sets where the setting itself is not given."""


class SchedulerConfig(Config):
    """Limits of one step and of the queue. A preset fills in what is not said: see PRESETS in sched/admission.py."""

    preset: Preset = "balanced"
    """latency: small steps, at most 32 at once; balanced: 8 at once, 64 when many wait; throughput: 64 at once, large steps."""
    start_batch: PositiveInt = 8
    """Requests worked on at once while few wait."""
    max_batch: PositiveInt = 64
    """Most requests worked on at once."""
    grow_above: int = Field(3, ge=0)
    """While more requests wait than this, the number worked on doubles with each step, up to max_batch."""
    max_wait_seconds: NonNegativeFloat = 0.05
    """A request that has waited so long is taken in although start_batch are worked on, if max_batch allows."""
    step_tokens: PositiveInt = 512
    """Most tokens in one step: bounds how long a long prompt can hold up the others."""
    max_waiting: PositiveInt = 256
    """Further requests are refused while this many wait."""
    prefix_cache: bool = True
    """Keep the keys of finished texts while there is room, for later requests that begin alike."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        preset = table.get("preset", "balanced")
        filled = {**PRESETS.get(preset, {}), **table} if isinstance(preset, str) else table
        if "start_batch" not in table and isinstance(filled.get("max_batch"), int):
            filled["start_batch"] = min(filled["start_batch"], max(1, filled["max_batch"]))
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> SchedulerConfig:
        if self.start_batch > self.max_batch:
            raise ValueError(f"start_batch {self.start_batch} must not be more than max_batch {self.max_batch}")
        return self


class Admission:
    """Says how many requests may be worked on in the next step."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.limit = config.start_batch

    def update(self, running: int, waiting: int, longest_wait: float) -> int:
        """The limit for the next step. `longest_wait`: seconds that the next in line has waited."""
        config = self._config
        if waiting > config.grow_above:
            self.limit = min(config.max_batch, 2 * self.limit)
        elif not waiting and 2 * running <= self.limit:
            self.limit = max(config.start_batch, self.limit // 2)
        overdue = waiting > 0 and longest_wait >= config.max_wait_seconds
        return min(config.max_batch, max(self.limit, running + waiting)) if overdue else self.limit
