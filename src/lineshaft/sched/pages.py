"""The pool of cache pages: every page is free or held by one request, never both."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Page numbers 0 to pages - 1; the most recently freed are handed out first, while they are warm in the processor's cache."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """That many pages; the caller has looked at `free`."""
        assert count <= len(self._free)
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that were taken."""
        for page in pages:
            self._held.remove(page)
            self._free.append(page)

    def check(self) -> None:
        """Each page is free or held, never both, never neither. Tests call this after every move."""
        assert len(set(self._free)) == len(self._free)
        assert not self._held & set(self._free)
        assert self._held | set(self._free) == set(range(self.pages))
