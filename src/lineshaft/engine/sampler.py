"""Choosing the next token of each request, and telling how likely it was. Free of torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lineshaft.engine.penalties import alter, wanted
from lineshaft.engine.program import Choices, Floats
from lineshaft.sched.request import Request, Score

_ROWS = 64


class Sampler:
    """Keeps one random generator a request, so that a seed gives the same answer in any company."""

    def __init__(self, draw: Callable[[Floats, Choices], list[int]]) -> None:
        """`draw`: see Runs."""
        self._draw = draw
        self._generators: dict[int, np.random.Generator] = {}

    def __call__(self, logits_RV: Floats, requests: list[Request]) -> tuple[list[int], list[Score | None] | None]:
        """A token for each row of logits, -1 where none is a number; and scores where a request wants them (None: none does)."""
        tokens = self._tokens(logits_RV, requests) if requests else []
        if all(request.sampling.logprobs is None for request in requests):
            return tokens, None
        return tokens, [self._score(logits_RV[row], tokens[row], request) for row, request in enumerate(requests)]

    def forget(self, number: int) -> None:
        """The request has ended."""
        self._generators.pop(number, None)

    def _tokens(self, logits_RV: Floats, requests: list[Request]) -> list[int]:
        altered = [(row, *alter(logits_RV[row], request)) for row, request in enumerate(requests) if wanted(request.sampling)]
        tokens = self._greatest(logits_RV, requests) or self._drawn(logits_RV, requests)
        for row, ids, before in altered:  # scores are of what the model said
            logits_RV[row][ids] = before
        return tokens

    @staticmethod
    def _greatest(logits_RV: Floats, requests: list[Request]) -> list[int] | None:
        """Where all take the greatest, and it is a number."""
        if any(request.sampling.temperature for request in requests):
            return None
        tokens = logits_RV.argmax(-1)
        found_R = logits_RV[np.arange(len(tokens)), tokens]
        return tokens.tolist() if (found_R > -np.inf).all() else None

    def _drawn(self, logits_RV: Floats, requests: list[Request]) -> list[int]:
        return self._draw(logits_RV, np.array([self._choice(request, logits_RV.shape[1]) for request in requests], np.float64))

    def _choice(self, request: Request, vocabulary: int) -> tuple[float, int, float, float, float]:
        """A row of choices (ops/sampling.py)."""
        sampling = request.sampling
        luck = self._generator(request).random() if sampling.temperature else 0.0
        return sampling.temperature, min(sampling.top_k, vocabulary), sampling.top_p, sampling.min_p, luck

    @staticmethod
    def _score(logits_V: Floats, token: int, request: Request) -> Score | None:
        return None if request.sampling.logprobs is None else score(logits_V, token, request.sampling.logprobs)

    def _generator(self, request: Request) -> np.random.Generator:
        if request.number not in self._generators:
            seed = request.sampling.seed
            self._generators[request.number] = np.random.default_rng(None if seed is None else seed % 2**64)  # it takes none below 0
        return self._generators[request.number]


def score(logits_V: Floats, token: int, top: int) -> Score:
    """Log-probability of a token, and the `top` likeliest with theirs; equally likely ones in order of their ids."""
    greatest = logits_V.max()
    with np.errstate(invalid="ignore"):  # infinite logits are no numbers afterwards, as they should be
        chances_V = logits_V - greatest
        chances_V -= np.log(np.exp(chances_V).sum())
    return Score(float(chances_V[token]), _likeliest(chances_V, top) if top else ())


def _likeliest(chances_V: Floats, top: int) -> tuple[tuple[int, float], ...]:
    """Of every 64th number, and every 64th from the next one on, and so on, the greatest: as many are at least as great as the last of
    the `top` greatest of these, and few others are. Looking for that among all would take several times as long as all the rest."""
    columns = len(chances_V) // _ROWS
    least = np.float32(-np.inf)
    if columns >= top:
        least = np.partition(chances_V[: _ROWS * columns].reshape(_ROWS, columns).max(0), -top)[-top]
    ids = np.flatnonzero(chances_V >= least)
    ranked = sorted(zip(ids.tolist(), chances_V[ids].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple(ranked[:top])
