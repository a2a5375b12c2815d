"""What an indexer chooses (DeepSeek-V3.2, section 2.1): small heads score earlier tokens, and the best of them are attended to.

Shape letters: T queries, S keys, J heads of the indexer, D their width, K how many may be chosen, P pages of B tokens, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineshaft.ops.reach import Reach


def scores(q_TJD: Tensor, weight_TJ: Tensor, key_SD: Tensor) -> Tensor:
    """float32 [T, S]: how much each token wants to see each key (equation 1). Rounded in the order in which transformers rounds."""
    near_TJS = (torch.matmul(q_TJD.float(), key_SD.float().T) * key_SD.shape[-1] ** -0.5).relu()
    return torch.matmul(weight_TJ[:, None], near_TJS)[:, 0]


def best(scores_TS: Tensor, seen_TS: Tensor, top_k: int) -> Tensor:
    """Bool [T, S]: of what a token may see, the top_k of highest score, or all if they are no more.

    Of equal scores, and ReLU makes many zeros, the earlier key wins: the choice must not hang on how a batch is cut.
    """
    if scores_TS.shape[1] <= top_k:
        return seen_TS
    scores_TS = scores_TS.masked_fill(~seen_TS, -torch.inf)
    last_T1 = scores_TS.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    better_TS, equal_TS = scores_TS > last_T1, (scores_TS == last_T1) & seen_TS
    room_T1 = top_k - better_TS.sum(-1, keepdim=True)
    return better_TS | (equal_TS & (equal_TS.cumsum(-1) <= room_T1))


def choose_keys(
    q_TJD: Tensor,
    weight_TJ: Tensor,
    pages: Tensor,
    chunks_C4: Tensor,
    tables: Tensor,
    top_k: int,
    reach: Reach,
    longest: int,
    count_1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token of the chunks attends to, so that `paged_attention` reads it as pages of one token each.

    pages: [P, B, D], index keys; chunks_C4, tables, count_1: see `reference.paged_attention`. weight_TJ: float32. `longest`: most tokens of
    a text. Result: int32 [T, K], slots (page * B + place) in order of position, as many as were chosen, then -1;
    int64 [T, 4], a chunk for each token, whose table is its row of slots; int64 [1], how many chunks that are: T.
    """
    slots_TK, found_T4 = torch.full((len(q_TJD), top_k), -1, dtype=torch.int32), torch.zeros(len(q_TJD), 4, dtype=torch.int64)
    size, tokens = pages.shape[1], 0
    for row, first, count, start in chunks_C4[: None if count_1 is None else int(count_1)].tolist():
        positions_S = torch.arange(first + count)
        table = tables[start : start - (-len(positions_S) // size)].long().clamp(min=0)
        slots_S = table[positions_S // size] * size + positions_S % size
        seen_TS, own = reach.visible(torch.arange(first, first + count)[:, None], positions_S[None]), slice(row, row + count)
        picked_TS = best(scores(q_TJD[own], weight_TJ[own], pages.flatten(0, 1)[slots_S]), seen_TS, top_k)
        for token, picked_S in enumerate(picked_TS, row):
            mine = slots_S[picked_S]
            slots_TK[token, : len(mine)] = mine
            found_T4[token] = torch.tensor([token, len(mine) - 1, 1, token * top_k])
        tokens += count
    return slots_TK, found_T4, torch.tensor([tokens])
