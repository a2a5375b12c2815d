"""How queries meet keys: the protocol that model and surroundings agree on, and its form inside one batch.

Tokens of all documents or requests lie packed in one row of T. The model computes queries, keys and values for the row;
an `Attend` decides what each token sees: the earlier tokens of its document (here), or a paged cache (engine/attend).

Shape letters: T packed tokens, H query heads, K key-value heads, D head width, N width of the part without positions,
R rotary width, C latent width, V value width, S context, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.model.linear import Linear


@dataclass(frozen=True)
class Reach:
    """How scores are scaled and how far back a token sees."""

    scale: float
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: everything before it."""


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

    def absorb(self) -> tuple[Tensor, Tensor]:
        """Queries against latents [T, H, C], and the value half of the up-projection [H, V, C]."""
        weight_HWC = self.up.dense_weight(self.nope_THN.dtype).view(self.nope_THN.shape[1], -1, self.up.in_features)
        up_key_HNC, up_value_HVC = weight_HWC.split_with_sizes(self._widths(), 1)
        return torch.einsum("thn,hnc->thc", self.nope_THN, up_key_HNC), up_value_HVC

    def _widths(self) -> list[int]:
        heads, nope = self.nope_THN.shape[1:]
        return [nope, self.up.out_features // heads - nope]


class Attend(Protocol):
    """How queries meet keys, for every layer of one forward pass."""

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, reach: Reach) -> Tensor:
        """Attention output [T, H, D] of rotated queries and keys."""

    def mla(self, layer: int, query: LatentQuery, latent_TC: Tensor, k_rope_TR: Tensor, reach: Reach) -> Tensor:
        """Attention output [T, H, V] of latent attention; `latent_TC` is normalised, `k_rope_TR` rotated."""


class PackedCausal:
    """Causal attention inside each of several documents packed in one row: for training, calibration and scoring.

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
        document_T = torch.searchsorted(starts_D, torch.arange(tokens), right=True)
        self.document_BS = document_T.view(-1, self.row)
        self._visible: dict[int | None, Tensor] = {}

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, reach: Reach) -> Tensor:
        """See Attend."""
        out_BHSD = F.scaled_dot_product_attention(
            self._blocks(q_THD),
            self._blocks(k_TKD),
            self._blocks(v_TKD),
            attn_mask=self._mask(reach.window).to(q_THD.device),
            scale=reach.scale,
            enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
        )
        return out_BHSD.transpose(1, 2).flatten(0, 1)

    def mla(self, layer: int, query: LatentQuery, latent_TC: Tensor, k_rope_TR: Tensor, reach: Reach) -> Tensor:
        """See Attend. Expands the latents."""
        k_nope_THN, v_THV = query.expand(latent_TC)
        heads = query.nope_THN.shape[1]
        k_THD = torch.cat([k_nope_THN, k_rope_TR[:, None].expand(-1, heads, -1).to(k_nope_THN.dtype)], -1)
        q_THD = torch.cat([query.nope_THN, query.rope_THR], -1)
        return self.gqa(layer, q_THD, k_THD, v_THV, reach)

    def _blocks(self, x_THD: Tensor) -> Tensor:
        return x_THD.view(-1, self.row, *x_THD.shape[1:]).transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        """Bool [B, 1, S, S]: same document, not in the future, not behind the window."""
        if window not in self._visible:
            back_SS = torch.arange(self.row)[:, None] - torch.arange(self.row)[None, :]
            near_SS = back_SS >= 0 if window is None else (back_SS >= 0) & (back_SS < window)
            same_BSS = self.document_BS[:, :, None] == self.document_BS[:, None, :]
            self._visible[window] = (same_BSS & near_SS)[:, None]
        return self._visible[window]
