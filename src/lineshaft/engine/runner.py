"""Runs one plan through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.engine.attend import PagedAttend
from lineshaft.engine.cache import PagedCache
from lineshaft.model.decoder import Decoder
from lineshaft.sched.scheduler import Plan


class Runner:
    """Model and cache; no memory of requests."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Logits [R, vocabulary] in float32, one row for each of `plan.sampling`."""
        tokens = [token for chunk in plan.chunks for token in chunk.request.tokens[chunk.first : chunk.last]]
        positions = torch.cat([torch.arange(chunk.first, chunk.last) for chunk in plan.chunks])
        hidden_TI = self.model.hidden(torch.tensor(tokens), positions, PagedAttend(self.cache, plan))
        ends = torch.tensor([chunk.last - chunk.first for chunk in plan.chunks]).cumsum(0) - 1
        sampled = torch.tensor([chunk.samples for chunk in plan.chunks])
        return self.model.logits(hidden_TI[ends[sampled]]).float()
