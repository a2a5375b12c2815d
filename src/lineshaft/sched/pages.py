"""The pool of cache pages of one layer group: who holds which page, and which pages still hold a known text.

A page is free (its content means nothing), held (by one request, or by several that share a text), or idle: held by
nobody, but its content is known under a key, so that a request with the same text can take it up again. Idle pages are
given away when no free one is left, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Page numbers 0 to pages - 1; the most recently freed are handed out first, while they are warm in the processor's cache."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones, and idle ones, whose content is then lost."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that requests hold."""
        return self.pages - self.available

    def take(self, count: int) -> list[int]:
        """That many pages, each for one holder; the caller has looked at `available`."""
        assert count <= self.available
        return [self._take_one() for _ in range(count)]

    def share(self, page: int) -> None:
        """One more holder for a page whose content is wanted; an idle one is held again."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder fewer for each. The first given back is the first to be lost."""
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """The page is full, and its content will not change any more. Where the key has a page already, that one stays."""
        if key not in self._page_of:
            assert page not in self._key_of
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        """The page with this content, if it is still there."""
        return self._page_of.get(key)

    def is_idle(self, page: int) -> bool:
        """Would sharing this page make one fewer available?"""
        return page in self._idle

    def writable(self, page: int) -> bool:
        """May its one holder write into it? Not when others hold it too, or may find it by its key."""
        return self._holders[page] == 1 and page not in self._key_of

    def check(self, held: Iterable[int]) -> None:
        """Every page is free, idle or held, and its count equals its holders: `held` names a page once for each. For tests."""
        counts = [0] * self.pages
        for page in held:
            counts[page] += 1
        assert counts == self._holders
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free)
        assert not free & idle
        assert free | idle == {page for page, count in enumerate(counts) if not count}
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert idle <= set(self._key_of)
        assert not free & set(self._key_of)

    def _take_one(self) -> int:
        page = self._free.pop() if self._free else self._evict()
        self._holders[page] = 1
        return page

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
