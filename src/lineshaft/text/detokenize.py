"""Streaming detokenizing: token ids in one by one, text out as soon as it is certain.

A token need not end where a character does, and some decoders look at a token's neighbours, so ids can't be decoded
one at a time. `Detokenizer` decodes a short window of the last ids instead and hands out what is new in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What stands in decoded text for bytes that form no character, or not yet."""

_LONGEST_DOUBT = 7
"""An unfinished character is at most 3 bytes, and byte fallback also blurs the up to 4 bytes before it, so a longer run
of replacement characters will never turn into anything else."""
_WINDOW_IDS = 32
"""The window is shortened when it has grown to this, which only damaged text does."""


class Decodes(Protocol):
    """The part of `Tokenizer` that is needed here."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out, damaged bytes as U+FFFD."""


class Detokenizer:
    """Turns one answer's tokens into text; make a new one for each request. Time for a token does not grow with the answer.

    With a byte-level tokenizer all pushes and `finish` together give exactly what `decode` gives for all ids. With byte
    fallback (SentencePiece) this holds for undamaged text; a stray byte makes that decoder take back characters before
    it, which a stream can't.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        """The window: ids whose text is out already, kept as context, then ids whose text is not yet certain."""
        self._settled = 0
        """How many ids of the window are context."""
        self._text = ""
        """Text of the window."""
        self._told = 0
        """How many characters of it are out."""
        self._limit = _WINDOW_IDS

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is now certain: "" inside a character of several bytes."""
        seen = token in self._ids
        self._ids.append(token)
        before, self._text = self._text, self._decode(self._ids)
        if self._text == before and not before.endswith(REPLACEMENT) and (before or seen):
            self._ids.pop()  # a special token: invisible, and must not fill the window
            return ""
        certain = len(self._text) - self._doubtful()
        new = self._text[self._told : certain]
        self._told = max(self._told, certain)
        if new and certain == len(self._text):
            self._keep_from(self._settled)
            self._settled = len(self._ids)
        elif len(self._ids) > self._limit:
            self._shorten()
        return new

    def finish(self) -> str:
        """The text still held back, with U+FFFD for a character that never got its last byte."""
        new = self._text[self._told :]
        self._told = len(self._text)
        return new

    def _doubtful(self) -> int:
        """Characters at the end of the window that later bytes may change."""
        run = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        return run if run <= _LONGEST_DOUBT else 1

    def _keep_from(self, cut: int) -> None:
        self._ids = self._ids[cut:]
        self._text = self._decode(self._ids)
        self._told = len(self._text)
        self._limit = _WINDOW_IDS

    def _shorten(self) -> None:
        """Drop ids from the front of a window that never comes to a clean end.

        A cut is right where both sides decode to the same as the whole. The right side needs two characters for that,
        since its last may still change.
        """
        for cut in range(len(self._ids) // 2, len(self._ids) // 2 + 4):
            left, right = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            if left + right == self._text and len(right) > 1 and len(left) <= self._told:
                self._ids, self._text = self._ids[cut:], right
                self._told -= len(left)
                self._settled = max(0, self._settled - cut)
                return
        self._limit = 2 * len(self._ids)  # look again later, rarely enough that the cost for a token stays bounded
