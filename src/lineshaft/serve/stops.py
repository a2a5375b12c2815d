"""Stop strings in a stream of text: found across the borders of tokens, never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on until one of the stop strings is complete.

    The result depends on the text only, not on how it was cut into pieces: the stop string that is complete first wins,
    and of two that end together the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.found = False

    def push(self, text: str) -> str:
        """Add text. Returns what can be shown now; after `found` turned true nothing more will come."""
        text = self._held + text
        hits = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text still held back, when no more can follow."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
