"""Choosing a token by its logits: the rules, and what every kernel that follows them is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures below and above count as these: in float32 they would be zero and infinite, and what they choose is the same."""
COLUMNS = 5
"""Of a table of choices: temperature (0: the greatest logit), top-k (0: all), top-p, min-p, and luck, from 0 to below 1."""


def truncated(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities after temperature, then top-k, top-p and min-p in that order (transformers' order); zero for what is ruled out.

    Tokens as likely as the last of the top k stay in. Equally likely tokens enter top-p in the order of their ids.
    """
    logits_V = (logits_V - logits_V.max()) / min(max(temperature, COLDEST), HOTTEST)  # from zero down: no temperature makes it overflow
    if 0 < top_k < len(logits_V):
        floor = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, -torch.inf)
    chances_V = logits_V.softmax(-1)
    if top_p < 1:
        ranked, order = chances_V.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # the token that crosses the line stays
        beyond[0] = False  # also where float32 takes top_p for zero
        chances_V = chances_V.index_fill(0, order[beyond], 0.0)
    if min_p > 0:
        chances_V = chances_V.masked_fill(chances_V < min_p * chances_V.max(), 0.0)
    return chances_V / chances_V.sum()


def chosen(logits_V: Tensor, temperature: float, top_k: float, top_p: float, min_p: float, luck: float) -> Tensor:
    """The token, int64 []: with the chances laid end to end in the order of ids, the one that has the place `luck` of their length
    (inversion sampling). Of equal greatest logits the first. What is not a number is never chosen; -1 where nothing else is there."""
    logits_V = torch.where(logits_V.isnan(), -torch.inf, logits_V)
    top = logits_V.max()
    if top == -torch.inf:
        return torch.tensor(-1)
    if temperature == 0 or top == torch.inf:
        return logits_V.argmax()
    ends_V = truncated(logits_V, temperature, int(top_k), top_p, min_p).double().cumsum(0)
    return torch.searchsorted(ends_V, ends_V[-1] * luck, right=True)
