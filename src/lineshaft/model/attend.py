"""How queries meet keys: the protocol that model and surroundings agree on, and its form inside one batch.

Tokens of all documents or requests lie packed in one row of T. The model computes queries, keys and values for the row;
an `Attend` decides what each token sees: the earlier tokens of its document (here), or a paged cache (engine/attend).

Shape letters: T packed tokens, H query heads, K key-value heads, D head width, N width of the part without positions,
R rotary width, C latent width, V value width, J index heads, S context, B rows of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lineshaft.model.linear import Linear
from lineshaft.ops import reference_indexer as choice
from lineshaft.ops import table as ops
from lineshaft.ops.packed import PackedHeads
from lineshaft.ops.reach import Reach
from lineshaft.ops.reference import sees_all

ALONE = 128
"""From this mean length on documents are worked on one by one; shorter ones together under a mask, which is fewer calls."""

SCORED = 64
"""Queries that an indexer scores at a time: each of its heads makes a float32 for each of them and each key."""


@dataclass(frozen=True)
class IndexQuery:
    """What the lightning indexer asks (DeepSeek-V3.2, section 2.1, equation 1). Its choice has no gradient."""

    q_TJD: Tensor
    """Rotated queries of J small heads."""
    weight_TJ: Tensor
    """float32, how much each head counts for each token; the factor J^-0.5 is in it."""
    key_TD: Tensor
    """These tokens' own keys, normalised and rotated, one for all heads: what later tokens are compared with."""
    top_k: int

    @torch.no_grad()
    def chosen(self, key_SD: Tensor, first: int, reach: Reach) -> Tensor:
        """`reference_indexer.best`, bool [T, S]; the queries are at positions `first` and on."""
        here_T = torch.arange(first, first + len(self.q_TJD), device=key_SD.device)
        return self.among(key_SD, reach.visible(here_T[:, None], torch.arange(len(key_SD), device=key_SD.device)[None]))

    @torch.no_grad()
    def among(self, key_SD: Tensor, seen_TS: Tensor) -> Tensor:
        """`chosen` of the keys that each token may see, bool [T, S]; keys stand in order of position."""
        if len(key_SD) <= self.top_k:
            return seen_TS
        return choice.best(choice.scores(self.q_TJD, self.weight_TJ, key_SD), seen_TS, self.top_k)

    def of(self, rows: slice | Tensor) -> IndexQuery:
        """The same for some of the tokens."""
        return IndexQuery(self.q_TJD[rows], self.weight_TJ[rows], self.key_TD[rows], self.top_k)

    def tiles(self, key_SD: Tensor, reach: Reach) -> Iterator[tuple[slice, Tensor]]:
        """(rows, `chosen` of these rows, as wide as the last one's position) for the last T of S positions.

        SCORED rows at a time.
        """
        before = len(key_SD) - len(self.q_TJD)
        for start in range(0, len(self.q_TJD), SCORED):
            rows = slice(start, min(start + SCORED, len(self.q_TJD)))
            yield rows, self.of(rows).chosen(key_SD[: before + rows.stop], before + rows.start, reach)


@dataclass(frozen=True)
class LatentQuery:
    """Queries of latent attention, with the up-projection that makes keys and values from latents.

    Whoever attends may expand the latents to keys and values (good for many queries a latent), or take the queries down
    to the latents instead (good for few: nothing is expanded). The two are equal but for rounding.
    """

    nope_THN: Tensor
    rope_THR: Tensor
    up: Linear
    """[C] to H blocks of N key and V value channels."""

    def expand(self, latent_SC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without positions [S, H, N] and values [S, H, V] of these latents."""
        keys, values = self.up(latent_SC).view(len(latent_SC), self.nope_THN.shape[1], -1).split_with_sizes(self._widths(), -1)
        return keys, values

    def absorbed(self) -> Tensor:
        """Queries against latents [T, H, C]."""
        packed = self.up.format
        if isinstance(packed, PackedHeads):
            return ops.packed_by_head(self.nope_THN, self.up.tensors()["packed_keys"], packed.keys)
        return ops.by_head(self.nope_THN, self._halves()[0])

    def values(self, out_THC: Tensor) -> Tensor:
        """What attention over latents gives, taken through the value half of the up-projection: [T, H, V]."""
        packed = self.up.format
        if isinstance(packed, PackedHeads):
            return ops.packed_by_head(out_THC, self.up.tensors()["packed_values"], packed.values)
        return ops.by_head(out_THC, self._halves()[1].transpose(1, 2))

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Key and value half of the up-projection, [H, N, C] and [H, V, C]."""
        weight_HWC = self.up.dense_weight(self.nope_THN.dtype).view(self.nope_THN.shape[1], -1, self.up.in_features)
        up_key_HNC, up_value_HVC = weight_HWC.split_with_sizes(self._widths(), 1)
        return up_key_HNC, up_value_HVC

    def _widths(self) -> list[int]:
        heads, nope = self.nope_THN.shape[1:]
        return [nope, self.up.out_features // heads - nope]


class Attend(Protocol):
    """How queries meet keys, for every layer of one forward pass."""

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """Attention output [T, H, D] of rotated queries and keys; scores are multiplied by `scale`."""

    def mla(
        self,
        layer: int,
        query: LatentQuery,
        latent_TC: Tensor,
        k_rope_TR: Tensor,
        scale: float,
        reach: Reach,
        index: IndexQuery | None = None,
    ) -> Tensor:
        """Attention output [T, H, V] of latent attention; `latent_TC` is normalised, `k_rope_TR` rotated. `index` narrows the reach."""


class PackedCausal:
    """Attention inside each of several documents packed in one row: for training, calibration and scoring.

    `starts`: index of the first token of each document, ascending, the first one 0. `row`: every multiple of it is such a
    start, so scores are computed in T / row blocks of row x row instead of one of T x T. ValueError when they are not so.
    """

    def __init__(self, starts: Sequence[int] | Tensor, tokens: int, row: int | None = None) -> None:
        self.row = row or tokens
        if tokens % self.row:
            raise ValueError(f"{tokens} tokens do not divide into rows of {self.row}")
        starts_D = torch.as_tensor(starts, dtype=torch.int64)
        if not torch.isin(torch.arange(0, tokens, self.row), starts_D).all():
            raise ValueError(f"every multiple of row {self.row} must be the start of a document: what is before it would not be seen")
        document_T = torch.searchsorted(starts_D, torch.arange(tokens), right=True) - 1
        self.document_BS = document_T.view(-1, self.row)
        self.place_BS = (torch.arange(tokens) - starts_D[document_T]).view(-1, self.row)
        self.documents = [slice(start, stop) for start, stop in pairwise([*starts_D.tolist(), tokens])]
        self._visible: dict[Reach, Tensor] = {}

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See Attend."""
        whole_rows = len(self.documents) == len(self.document_BS)
        if whole_rows and sees_all(reach, self.row):
            return self._in_rows(q_THD, k_TKD, v_TKD, None, scale)
        if len(q_THD) < ALONE * len(self.documents):
            return self._in_rows(q_THD, k_TKD, v_TKD, self._mask(reach).to(q_THD.device), scale)
        return torch.cat([ops.reach_gqa(q_THD[own], k_TKD[own], v_TKD[own], scale, reach) for own in self.documents])

    def mla(
        self,
        layer: int,
        query: LatentQuery,
        latent_TC: Tensor,
        k_rope_TR: Tensor,
        scale: float,
        reach: Reach,
        index: IndexQuery | None = None,
    ) -> Tensor:
        """See Attend. Expands the latents."""
        k_nope_THN, v_THV = query.expand(latent_TC)
        heads = query.nope_THN.shape[1]
        k_THD = ops.join(k_nope_THN, k_rope_TR[:, None].expand(-1, heads, -1).to(k_nope_THN.dtype))
        q_THD = ops.join(query.nope_THN, query.rope_THR)
        if index is None or all(own.stop - own.start <= index.top_k for own in self.documents):
            return self.gqa(layer, q_THD, k_THD, v_THV, scale, reach)
        return torch.cat([self._chosen(q_THD[own], k_THD[own], v_THV[own], scale, reach, index.of(own)) for own in self.documents])

    @staticmethod
    def _chosen(q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, scale: float, reach: Reach, index: IndexQuery) -> Tensor:
        """One document, whose tokens see what the indexer picks."""
        outs = []
        for rows, chosen_TS in index.tiles(index.key_TD, reach):
            outs.append(ops.attention(q_THD[rows], k_THD[: rows.stop], v_THV[: rows.stop], chosen_TS, scale))
        return torch.cat(outs)

    def _in_rows(self, q_THD: Tensor, k_TKD: Tensor, v_TKV: Tensor, seen_BSS: Tensor | None, scale: float) -> Tensor:
        q_BSHD, k_BSKD, v_BSKV = (x.view(-1, self.row, *x.shape[1:]) for x in (q_THD, k_TKD, v_TKV))
        return ops.rows_gqa(q_BSHD, k_BSKD, v_BSKV, seen_BSS, scale).flatten(0, 1)

    def _mask(self, reach: Reach) -> Tensor:
        """Bool [B, S, S]: same document, and in reach."""
        if reach not in self._visible:
            same_BSS = self.document_BS[:, :, None] == self.document_BS[:, None, :]
            self._visible[reach] = same_BSS & reach.visible(self.place_BS[:, :, None], self.place_BS[:, None, :])
        return self._visible[reach]
