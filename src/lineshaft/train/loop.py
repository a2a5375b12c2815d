"""The training loop: one for every objective."""

from __future__ import annotations

import ctypes
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.base.errors import TrainingError
from lineshaft.base.terminal import bar
from lineshaft.model.decoder import Decoder
from lineshaft.train import optimiser as adamw
from lineshaft.train import state
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import Objective
from lineshaft.train.optimiser import OptimiserConfig

Precision = Literal["float32", "bfloat16"]


class LoopConfig(Config):
    """How long, in what steps, and how precisely to train."""

    steps: PositiveInt = 400
    """Optimiser steps."""
    accumulate: PositiveInt = 1
    """Batches whose gradients are added up for one step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the products; weights and sums stay FP32. auto: bfloat16 where the processor has AMX, else float32."""
    balance_speed: float = Field(1e-3, ge=0)
    """How far the router bias moves in a step towards equally loaded experts; 0 leaves it alone."""
    save_every: PositiveInt = 100
    """Steps between resumable states."""
    log_every: PositiveInt = 5
    """Steps between entries of the loss history."""
    optimiser: OptimiserConfig = OptimiserConfig()

    @model_validator(mode="after")
    def _entries_are_whole(self) -> LoopConfig:
        if self.save_every % self.log_every:
            reason = "or a resumed history would differ"
            raise ValueError(f"save_every {self.save_every} must be a multiple of log_every {self.log_every}, {reason}")
        return self


class Batches(Protocol):
    """Training batches by number."""

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`, the same whenever it is asked for."""


Rate = Callable[[int], float]
"""The learning rate of a step, counted from 0."""


@dataclass(frozen=True)
class Trained:
    """What a finished run knows of itself."""

    history: state.History
    """One entry a logged step: step, loss (nats a token, mean since the last entry), lr, grad_norm, tokens so far."""
    tokens: int
    fresh_tokens: int
    """Tokens of this process; fewer than `tokens` after a resume."""
    seconds: float


AUTO: Precision = "float32"
"""What `auto` means: bfloat16 was measured slower on every processor, with AMX below a width of about 1000 (docs/adr/0007)."""


def run(
    model: Decoder, batches: Batches, objective: Objective, config: LoopConfig, scratch: Path, rate: Rate | None = None
) -> Trained:
    """Train `model` in place. States go to `scratch`; an interrupted run continues there to the same bits.

    `rate`: of each step, where these are part of a longer schedule; None: the optimiser's schedule over config.steps.
    `config.precision` must be settled. Raises TrainingError when loss or gradient are no longer numbers.
    """
    assert config.precision != "auto"
    _keep_freed_memory()
    optimiser = adamw.build(model, config.optimiser)
    rate = rate or partial(_scheduled, config)
    done, history = state.restore(scratch, model, optimiser)
    model.train()
    begun, fresh, gathered = time.perf_counter(), 0, _Gathered(history)
    with bar("train", config.steps, done=done) as progress:
        for step in range(done, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            loss, targets, tokens, norm = _step(model, batches, objective, config, optimiser, step)
            fresh += tokens
            gathered.add(loss, targets, tokens)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                gathered.log(step + 1, optimiser.param_groups[0]["lr"], norm)
            progress.advance(1, f"loss {loss / targets:.3f}  {fresh / (time.perf_counter() - begun):.0f} tokens/s")
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                state.save(scratch, step + 1, model, optimiser, history)
    model.eval()
    return Trained(history, int(history[-1]["tokens"]), fresh, time.perf_counter() - begun)


def _scheduled(config: LoopConfig, step: int) -> float:
    return adamw.learning_rate(config.optimiser, step, config.steps)


def _step(
    model: Decoder, batches: Batches, objective: Objective, config: LoopConfig, optimiser: torch.optim.AdamW, step: int
) -> tuple[float, int, int, float]:
    """One optimiser step; (summed loss, number of targets, number of tokens, gradient norm before clipping)."""
    parts = [batches[step * config.accumulate + part] for part in range(config.accumulate)]
    targets = sum(int((part.targets_T != IGNORE).sum()) for part in parts)
    if not targets:
        raise TrainingError(f"step {step + 1} has nothing to predict, each of its tokens ends a document: raise sequence_tokens or rows")
    total = 0.0
    for part in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = objective(model, part)
        (loss.total / targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += loss.next_token.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        told = "lower optimiser.peak_lr or raise optimiser.warmup_share; nothing was saved of this step"
        raise TrainingError(f"step {step + 1} has a loss of {total / targets} and a gradient norm of {norm}: {told}")
    optimiser.step()
    optimiser.zero_grad()
    for router in model.routers():
        router.rebalance(config.balance_speed)
    return total, targets, sum(len(part.tokens_T) for part in parts), norm


class _Gathered:
    """Adds up what lies between two entries of the history."""

    def __init__(self, history: state.History) -> None:
        self.history = history
        self.loss, self.targets = 0.0, 0
        self.tokens = int(history[-1]["tokens"]) if history else 0

    def add(self, loss: float, targets: int, tokens: int) -> None:
        self.loss, self.targets, self.tokens = self.loss + loss, self.targets + targets, self.tokens + tokens

    def log(self, step: int, lr: float, norm: float) -> None:
        entry = {"step": step, "loss": self.loss / self.targets, "lr": lr, "grad_norm": norm, "tokens": self.tokens}
        self.history.append(entry)
        self.loss, self.targets = 0.0, 0


_mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the system at each step.

    Training frees and asks for the same sizes over and over; handing fresh zeroed pages out cost an eighth of a step (docs/log.md). Other
    allocators have no such switch, and then nothing is changed.
    """
    if _mallopt is not None:
        threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
        _mallopt(threshold, 1 << 30)
        _mallopt(trim, (1 << 31) - 1)
