"""Texts whose keys and values lie in pages anywhere, among NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from native_cases import give_back
from torch import Tensor

from lineshaft.ops import native
from lineshaft.ops.reach import Reach


@dataclass(frozen=True)
class Text:
    """One request's queries, keys and values, position by position."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: int

    @staticmethod
    def of(first: int, tokens: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> Text:
        (heads, kv, width, values), luck = sizes, torch.Generator().manual_seed(seed)
        shapes = (tokens, heads, width), (first + tokens, kv, width), (first + tokens, kv, values)
        return Text(*((torch.randn(shape, generator=luck) * 2).to(dtype) for shape in shapes), first)


Piece = tuple[Text, int, int]
"""Queries from the first to before the second."""


def attend(pieces: list[Piece], reach: Reach, page: int, seed: int) -> list[Tensor]:
    """One call; every text lies in pages of its own, anywhere, and what nobody sees is given back. The result of each piece."""
    needs = [-(-(text.first + stop) // page) for text, _, stop in pieces]
    places = torch.randperm(sum(needs), generator=torch.Generator().manual_seed(seed)).int()
    keys, values = (torch.full((len(places), page, *getattr(pieces[0][0], part).shape[1:]), torch.nan).to(pieces[0][0].q) for part in "kv")
    chunks, tables, row = [], [], 0
    for (text, start, stop), table in zip(pieces, places.split(needs), strict=True):
        for pages, given_ in ((keys, text.k), (values, text.v)):
            for position in range(text.first + stop):
                pages[table[position // page], position % page] = given_[position]
        table = table.clone()
        give_back(table, reach, text.first + start, text.first + stop, page)
        chunks.append((row, text.first + start, stop - start, sum(map(len, tables))))
        tables.append(table)
        row += stop - start
    q = torch.cat([text.q[start:stop] for text, start, stop in pieces])
    out = native.paged_attention(q, keys, values, torch.tensor(chunks), torch.cat(tables), 0.4, reach)
    return list(out.split([stop - start for _, start, stop in pieces]))
