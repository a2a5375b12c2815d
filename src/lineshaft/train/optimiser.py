"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from lineshaft.base.config import Config


class OptimiserConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    kind: Literal["adamw"] = "adamw"
    peak_lr: PositiveFloat = 3e-3
    """Learning rate after warm-up."""
    final_lr_share: float = Field(0.05, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which the rate rises linearly from zero."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only; norms, biases and the embedding table are left alone."""
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


def build(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters, matrices with weight decay, the rest without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embed_tokens" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine down to the final share."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    low = config.final_lr_share
    return config.peak_lr * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
