"""Who sees whom, and dense attention under a mask, in other words than the product's: sets of positions, float64, numpy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.ops.reach import Blocks, Causal, Reach, Window

KINDS: dict[str, Reach] = {
    "causal": Causal(),
    "window": Window(window=5),
    "window-global": Window(window=4, global_tokens=3),
    "blocks": Blocks(block=3, local_blocks=2, stride=3),
}
"""One of each."""


def reaches() -> st.SearchStrategy[Reach]:
    """Any of them, small enough that a few dozen tokens go beyond it."""
    windows = st.builds(Window, window=st.integers(1, 12), global_tokens=st.integers(0, 5))
    blocks = st.builds(Blocks, block=st.integers(1, 6), local_blocks=st.integers(1, 3), stride=st.integers(1, 4))
    return st.just(Causal()) | windows | blocks


def seen_by(reach: Reach, q: int) -> set[int]:
    """Positions that the token at position q sees."""
    past = set(range(q + 1))
    if isinstance(reach, Window):
        return past & (set(range(q - reach.window + 1, q + 1)) | set(range(reach.global_tokens)))
    if isinstance(reach, Blocks):
        own = q // reach.block
        numbers = {own - back for back in range(reach.local_blocks)} | set(range(0, own + 1, reach.stride))
        return past & {number * reach.block + i for number in numbers for i in range(reach.block)}
    return past


def mask_of(reach: Reach, tokens: int, first: int = 0) -> np.ndarray:
    """Bool [tokens - first, tokens], for the queries from position `first` on."""
    mask = np.zeros((tokens - first, tokens), bool)
    for q in range(first, tokens):
        mask[q - first, list(seen_by(reach, q))] = True
    return mask


def dense(q_THD: Tensor, k_SKD: Tensor, v_SKV: Tensor, mask_TS: np.ndarray, scale: float) -> Tensor:
    """softmax(scale q k^T) v over what the mask leaves, in float64: [T, H, V]."""
    q, k, v = (x.detach().double().numpy() for x in (q_THD, k_SKD, v_SKV))
    out = np.empty((*q.shape[:2], v.shape[2]))
    for token in range(len(q)):
        seen = np.flatnonzero(mask_TS[token])
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            scores = k[seen, own] @ q[token, head] * scale
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[seen, own]
    return torch.from_numpy(out)
