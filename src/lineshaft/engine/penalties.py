"""What a request adds to and takes from the logits of single tokens: bias and penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lineshaft.sched.request import Request, Sampling

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def wanted(sampling: Sampling) -> bool:
    """Does it ask for any?"""
    return bool(sampling.logit_bias or sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


def alter(logits_V: Logits, request: Request) -> tuple[Ids, Logits]:
    """Change a row where it lies: bias first, then repetition over prompt and answer, frequency and presence over the answer.

    Gives the ids that may have changed, and what their logits were: to be put back.
    """
    sampling, answer = request.sampling, request.tokens[request.prompt_tokens :]
    repeated = set(request.tokens) if sampling.repetition_penalty != 1 else set()
    counted = Counter(answer) if sampling.frequency_penalty or sampling.presence_penalty else Counter()
    ids = _ids(repeated.union(sampling.logit_bias, counted))
    before = logits_V[ids]
    if sampling.logit_bias:
        logits_V[_ids(sampling.logit_bias)] += np.fromiter(sampling.logit_bias.values(), np.float32)
    if repeated:
        places = _ids(repeated)
        held = logits_V[places]
        logits_V[places] = np.where(held > 0, held / sampling.repetition_penalty, held * sampling.repetition_penalty)
    if counted:
        counts = np.fromiter(counted.values(), np.float32)
        logits_V[_ids(counted)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return ids, before


def _ids(tokens: Iterable[int]) -> Ids:
    return np.fromiter(tokens, np.int64)
