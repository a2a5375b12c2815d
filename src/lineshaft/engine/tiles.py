"""Attention over the paged cache in tiles of equal shape, so that a request's numbers do not depend on its company.

A tile is some neighbouring queries of one request, and the blocks of KEYS positions that hold a key which one of them
sees. Tiles of equal shape, from whichever requests, are worked on together: 16 requests that decode are one product. What
stands in a block but is not seen is read from the page of zeros and has no weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineshaft.engine.cache import PagedCache
from lineshaft.model.attend import IndexQuery, LatentQuery
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.cost import kv_width
from lineshaft.ops import table as ops
from lineshaft.ops.reach import Reach
from lineshaft.ops.steady import KEYS
from lineshaft.sched.groups import LayerGroup
from lineshaft.sched.plan import Chunk, Plan
from lineshaft.sched.request import GONE

SIZES = (1, 4, 16, 64)
"""Neighbouring queries in a tile: few different shapes. More than the last would waste more on keys that only some of them see."""

MOST_BYTES = 64 << 20
"""Most memory for the scores and keys of the tiles that are worked on together, unless one alone takes more."""


@dataclass(frozen=True)
class Tiles:
    """N tiles of M queries over S keys each. Shorter ones are filled up: with their last query, and with blocks that nobody sees."""

    rows_NM: Tensor
    """int64: the queries' places in the packed row."""
    slots_NS: Tensor
    """int64: where the keys lie, page * B + place in the page."""
    seen_NMS: Tensor
    """bool: may this query see that key."""


class TiledAttend:
    """Implements model.attend.Attend for one plan: writes the new keys first, then lets each request look at its own pages."""

    def __init__(self, cache: PagedCache, plan: Plan) -> None:
        self.cache = cache
        self._tokens = plan.tokens
        self._slots = [_written(cache, place, plan.chunks) for place in range(len(cache.groups))]
        self._tiles = [_tiles(cache, place, group, plan.chunks) for place, group in enumerate(cache.groups)]

    def gqa(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, reach: Reach) -> Tensor:
        """See model.attend.Attend."""
        group = self.cache.group_of[layer]
        self.cache.write(layer, self._slots[group], k_TKD[: self._tokens], v_TKD[: self._tokens])
        pages_k, pages_v = self.cache.parts[layer]
        out_THD = torch.zeros_like(q_THD)
        for tiles in self._tiles[group]:
            out = ops.tile_gqa(q_THD[tiles.rows_NM], pages_k, pages_v, tiles.slots_NS, tiles.seen_NMS, scale)
            out_THD[tiles.rows_NM.flatten()] = out.flatten(0, 1)
        return out_THD

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
        """See model.attend.Attend. Absorbs the up-projection: nothing is expanded, however long the context."""
        group, real = self.cache.group_of[layer], slice(0, self._tokens)
        entry_TE = torch.cat([latent_TC, k_rope_TR], -1)
        self.cache.write(layer, self._slots[group], entry_TE[real], *([] if index is None else [index.key_TD[real]]))
        pages, *index_pages = self.cache.parts[layer]
        q_THC = query.absorbed()
        q_THE, latent = torch.cat([q_THC, query.rope_THR], -1), q_THC.shape[-1]
        out_THC = torch.zeros_like(q_THC)
        for tiles in self._tiles[group]:
            seen = tiles.seen_NMS if index is None else _chosen(index, index_pages[0], tiles)
            out = ops.tile_mla(q_THE[tiles.rows_NM], pages, tiles.slots_NS, seen, scale, latent)
            out_THC[tiles.rows_NM.flatten()] = out.flatten(0, 1)
        return query.values(out_THC)


def _chosen(index: IndexQuery, pages: Tensor, tiles: Tiles) -> Tensor:
    """Bool [N, M, S]: of what each query may see, what the indexer picks."""
    keys = pages.flatten(0, 1)
    each = zip(tiles.rows_NM, tiles.slots_NS, tiles.seen_NMS, strict=True)
    return torch.stack([index.of(rows_M).among(keys[slots_S], seen_MS) for rows_M, slots_S, seen_MS in each])


def _written(cache: PagedCache, group: int, chunks: Sequence[Chunk]) -> Tensor:
    """The slots of the plan's own tokens."""
    size = cache.page_tokens
    slots = []
    for chunk in chunks:
        table = chunk.request.tables[group]
        slots += [table[place // size] * size + place % size for place in range(chunk.first, chunk.last)]
    return torch.tensor(slots)


def _tiles(cache: PagedCache, place: int, group: LayerGroup, chunks: Sequence[Chunk]) -> list[Tiles]:
    """All queries of the plan in tiles, those of equal shape together."""
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    row = 0
    for chunk in chunks:
        table_S = _slots_of(cache, place, chunk)
        for first in range(chunk.first, chunk.last, SIZES[-1]):
            last = min(first + SIZES[-1], chunk.last)
            queries = next(size for size in SIZES if size >= last - first)
            blocks = _blocks(group.reach, first, last)
            rows_M = (torch.arange(queries) + first).clamp(max=last - 1)
            positions_S = (torch.tensor(blocks)[:, None] * KEYS + torch.arange(KEYS)).flatten()
            seen_MS = group.reach.visible(rows_M[:, None], positions_S[None]) & (positions_S >= 0)
            slots_S = torch.where(seen_MS.any(0), table_S[positions_S.clamp(0, len(table_S) - 1)], cache.empty_slot(place))
            alike[queries, len(blocks)].append((rows_M - chunk.first + row, slots_S, seen_MS))
        row += chunk.last - chunk.first
    found = []
    for (queries, count), own in alike.items():
        together = max(1, MOST_BYTES // tile_bytes(cache.config, queries, count * KEYS))
        for start in range(0, len(own), together):
            found.append(Tiles(*(torch.stack(part) for part in zip(*own[start : start + together], strict=True))))
    return found


def tile_bytes(config: ModelConfig, queries: int, keys: int) -> int:
    """Scores of one tile, and its keys and values in float32."""
    a = config.attention
    own = kv_width(config) if isinstance(a, GroupedQueryAttention) else a.kv_lora_rank + a.qk_rope_head_dim
    return 4 * keys * (queries * a.num_attention_heads + own)


def working_bytes(config: ModelConfig, tokens: int) -> int:
    """Most memory that attention in tiles works in, for texts of at most so many tokens."""
    blocks = _common(-(-tokens // KEYS))
    return max(MOST_BYTES, tile_bytes(config, SIZES[-1], blocks * KEYS)) if tokens > KEYS else tile_bytes(config, SIZES[-1], KEYS)


def _slots_of(cache: PagedCache, place: int, chunk: Chunk) -> Tensor:
    """The slot of each position before the chunk's end; of a page that was given back, which is not seen, some slot or other."""
    size = cache.page_tokens
    table = torch.tensor([0 if page == GONE else page for page in chunk.request.tables[place]])
    return (table[:, None] * size + torch.arange(size)).flatten()[: chunk.last]


def _blocks(reach: Reach, first: int, last: int) -> list[int]:
    """Blocks of KEYS positions that queries from `first` to before `last` look at; -1, seen by nobody, up to a number that is common."""
    spans = reach.spans(first, last)
    blocks = sorted({block for start, stop in spans for block in range(start // KEYS, -(-stop // KEYS))})
    return blocks + [-1] * (_common(len(blocks)) - len(blocks))


def _common(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few different shapes, and at most half as much again to multiply."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power >= 4 else power
