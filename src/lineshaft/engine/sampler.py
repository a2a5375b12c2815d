"""Choosing the next token of each request."""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.sched.request import Request, Sampling

COLDEST = 1e-30
"""Lower temperatures count as this one: in float32 they would be zero, and what they choose is the same."""


class Sampler:
    """Keeps one random generator a request, so that a seed gives the same answer in any company."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits_RV: Tensor, requests: list[Request]) -> list[int]:
        """One token for each row of float32 logits."""
        return [self._one(logits_V, request) for logits_V, request in zip(logits_RV, requests, strict=True)]

    def forget(self, number: int) -> None:
        """The request has ended."""
        self._generators.pop(number, None)

    def _one(self, logits_V: Tensor, request: Request) -> int:
        if request.sampling.temperature == 0:
            return int(logits_V.argmax())
        chances_V = truncated(logits_V, request.sampling)
        return int(torch.multinomial(chances_V, 1, generator=self._generator(request)))

    def _generator(self, request: Request) -> torch.Generator:
        if request.number not in self._generators:
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
            self._generators[request.number] = generator
        return self._generators[request.number]


def truncated(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, then top-k, top-p and min-p in that order (transformers' order); zero for what is ruled out.

    Tokens as likely as the last of the top k stay in. Equally likely tokens enter top-p in the order of their ids.
    """
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, COLDEST)  # from zero down: no temperature makes it overflow
    if 0 < sampling.top_k < len(logits_V):
        floor = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, -torch.inf)
    chances_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        ranked, order = chances_V.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p  # the token that crosses the line stays
        chances_V = chances_V.index_fill(0, order[beyond], 0.0)
    if sampling.min_p > 0:
        chances_V = chances_V.masked_fill(chances_V < sampling.min_p * chances_V.max(), 0.0)
    return chances_V / chances_V.sum()
