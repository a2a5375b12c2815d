"""Cutting long texts into documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 8192
"""A piece ends at the first blank line after this many characters, and at any line after twice as many: a whole book in
one file still gives documents of which some can be held out."""


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """The text of `lines` (each with its line end) in pieces, nothing lost; at most one piece is held in memory."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if (size >= PIECE_CHARACTERS and not line.strip()) or size >= 2 * PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
