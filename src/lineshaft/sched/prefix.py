"""Finding the beginning of a text in the cache: each full page is named by everything up to its end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from lineshaft.sched.groups import LayerGroup
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import GONE, Request

_KEY_BYTES = 16
"""Two texts of equal keys would share an answer: 2^-128 a pair, and no chosen pair is known for BLAKE2b (RFC 7693)."""


def extend_keys(request: Request, pages: int, page_tokens: int) -> None:
    """Work out the keys of the request's first `pages` pages: each hashes the one before and the page's own tokens."""
    for page in range(len(request.keys), pages):
        before = request.keys[-1] if request.keys else b""
        own = array("q", request.tokens[page * page_tokens : (page + 1) * page_tokens]).tobytes()
        request.keys.append(blake2b(before + own, digest_size=_KEY_BYTES).digest())


def longest_match(request: Request, groups: Sequence[LayerGroup], pools: Sequence[PagePool], page_tokens: int) -> list[list[int]]:
    """For each group the pages of the longest beginning that all groups still have, GONE where a page would not be seen.

    At least the last token stays to be run: somebody must make the logits.
    """
    most = (len(request.tokens) - 1) // page_tokens
    extend_keys(request, most, page_tokens)
    found = [[pool.find(key) for key in request.keys[:most]] for pool in pools]
    length = min((_whole(pages) for group, pages in zip(groups, found, strict=True) if not group.forgets), default=most)
    while length > 0:
        seen = [group.seen_pages(length * page_tokens, page_tokens) & set(range(length)) for group in groups]
        missing = [page for pages, own in zip(found, seen, strict=True) for page in own if pages[page] is None]
        if not missing:
            return [_only(pages[:length], own) for pages, own in zip(found, seen, strict=True)]
        length = max(missing)  # any longer one would look back at that page as well
    return [[] for _ in groups]


def _whole(pages: list[int | None]) -> int:
    return next((place for place, page in enumerate(pages) if page is None), len(pages))


def _only(pages: list[int | None], seen: set[int]) -> list[int]:
    return [page if page is not None and place in seen else GONE for place, page in enumerate(pages)]
