"""Choosing the next token of each request, and telling how likely it was."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.sched.request import Request, Sampling, Score

COLDEST = 1e-30
"""Lower temperatures count as this one: in float32 they would be zero, and what they choose is the same."""


class Sampler:
    """Keeps one random generator a request, so that a seed gives the same answer in any company."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits_RV: Tensor, requests: list[Request]) -> tuple[list[int], list[Score | None] | None]:
        """A token for each row of float32 logits, and scores where a request wants them (None when none does)."""
        tokens: list[int] = logits_RV.numpy().argmax(-1).tolist()
        for row, request in enumerate(requests):
            if not _takes_the_greatest(request.sampling):
                tokens[row] = self._one(logits_RV[row], request)
        if all(request.sampling.logprobs is None for request in requests):
            return tokens, None
        return tokens, [self._score(logits_RV[row], tokens[row], request) for row, request in enumerate(requests)]

    def forget(self, number: int) -> None:
        """The request has ended."""
        self._generators.pop(number, None)

    def _one(self, logits_V: Tensor, request: Request) -> int:
        logits_V = altered(logits_V, request)
        if request.sampling.temperature == 0:
            return int(logits_V.argmax())
        chances_V = truncated(logits_V, request.sampling)
        return int(torch.multinomial(chances_V, 1, generator=self._generator(request)))

    @staticmethod
    def _score(logits_V: Tensor, token: int, request: Request) -> Score | None:
        return None if request.sampling.logprobs is None else score(logits_V, token, request.sampling.logprobs)

    def _generator(self, request: Request) -> torch.Generator:
        if request.number not in self._generators:
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
            self._generators[request.number] = generator
        return self._generators[request.number]


def _takes_the_greatest(sampling: Sampling) -> bool:
    plain = sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty
    return sampling.temperature == 0 and plain and not sampling.logit_bias


def score(logits_V: Tensor, token: int, top: int) -> Score:
    """Log-probability of a token, and the `top` likeliest with theirs; equally likely ones in order of their ids."""
    chances_V = F.log_softmax(logits_V, -1)
    likeliest: list[tuple[int, float]] = []
    if top:
        least = chances_V.topk(min(top, len(chances_V))).values[-1]
        ids = (chances_V >= least).nonzero()[:, 0]
        ranked = sorted(zip(ids.tolist(), chances_V[ids].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
        likeliest = ranked[:top]
    return Score(float(chances_V[token]), tuple(likeliest))


def altered(logits_V: Tensor, request: Request) -> Tensor:
    """Logits after bias and penalties: bias first, then repetition over prompt and answer, frequency and presence over the answer."""
    sampling, changed_V = request.sampling, logits_V
    if sampling.logit_bias:
        ids, amounts = torch.tensor(list(sampling.logit_bias)), torch.tensor(list(sampling.logit_bias.values()))
        changed_V = changed_V.index_add(0, ids, amounts)
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(request.tokens)))
        held = changed_V[ids]
        penalised = torch.where(held > 0, held / sampling.repetition_penalty, held * sampling.repetition_penalty)
        changed_V = changed_V.index_copy(0, ids, penalised)
    if (sampling.frequency_penalty or sampling.presence_penalty) and len(request.tokens) > request.prompt_tokens:
        counted = Counter(request.tokens[request.prompt_tokens :])
        ids, counts = torch.tensor(list(counted)), torch.tensor(list(counted.values()), dtype=torch.float32)
        changed_V = changed_V.index_add(0, ids, -(sampling.frequency_penalty * counts + sampling.presence_penalty))
    return changed_V


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
        beyond[0] = False  # also where float32 takes top_p for zero
        chances_V = chances_V.index_fill(0, order[beyond], 0.0)
    if sampling.min_p > 0:
        chances_V = chances_V.masked_fill(chances_V < sampling.min_p * chances_V.max(), 0.0)
    return chances_V / chances_V.sum()
