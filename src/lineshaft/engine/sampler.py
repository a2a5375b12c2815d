"""Choosing the next token of each request, and telling how likely it was."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.engine.penalties import Logits, alter, wanted
from lineshaft.ops import table as ops
from lineshaft.sched.request import Request, Score


class Sampler:
    """Keeps one random generator a request, so that a seed gives the same answer in any company."""

    def __init__(self) -> None:
        self._generators: dict[int, np.random.Generator] = {}

    def __call__(self, logits_RV: Tensor, requests: list[Request]) -> tuple[list[int], list[Score | None] | None]:
        """A token for each row of float32 logits, -1 where none is a number; and scores where a request wants them (None: none does)."""
        tokens = self._tokens(logits_RV, requests) if requests else []
        if all(request.sampling.logprobs is None for request in requests):
            return tokens, None
        return tokens, [self._score(logits_RV[row], tokens[row], request) for row, request in enumerate(requests)]

    def forget(self, number: int) -> None:
        """The request has ended."""
        self._generators.pop(number, None)

    def _tokens(self, logits_RV: Tensor, requests: list[Request]) -> list[int]:
        logits = logits_RV.numpy()
        altered = [(row, *alter(logits[row], request)) for row, request in enumerate(requests) if wanted(request.sampling)]
        tokens = self._greatest(logits, requests) or self._drawn(logits_RV, requests)
        for row, ids, before in altered:  # scores are of what the model said
            logits[row][ids] = before
        return tokens

    @staticmethod
    def _greatest(logits_RV: Logits, requests: list[Request]) -> list[int] | None:
        """Where all take the greatest, and it is a number."""
        if any(request.sampling.temperature for request in requests):
            return None
        tokens = logits_RV.argmax(-1)
        found_R = logits_RV[np.arange(len(tokens)), tokens]
        return tokens.tolist() if (found_R > -np.inf).all() else None

    def _drawn(self, logits_RV: Tensor, requests: list[Request]) -> list[int]:
        choices = torch.tensor([self._choice(request, logits_RV.shape[1]) for request in requests], dtype=torch.float64)
        with ops.steady():
            tokens: list[int] = ops.sample(logits_RV, choices).tolist()
        return tokens

    def _choice(self, request: Request, vocabulary: int) -> tuple[float, int, float, float, float]:
        """A row of choices (ops/sampling.py)."""
        sampling = request.sampling
        luck = self._generator(request).random() if sampling.temperature else 0.0
        return sampling.temperature, min(sampling.top_k, vocabulary), sampling.top_p, sampling.min_p, luck

    @staticmethod
    def _score(logits_V: Tensor, token: int, request: Request) -> Score | None:
        return None if request.sampling.logprobs is None else score(logits_V, token, request.sampling.logprobs)

    def _generator(self, request: Request) -> np.random.Generator:
        if request.number not in self._generators:
            seed = request.sampling.seed
            self._generators[request.number] = np.random.default_rng(None if seed is None else seed % 2**64)  # it takes none below 0
        return self._generators[request.number]


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
