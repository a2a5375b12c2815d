"""What a token's entry in the cache takes, free of torch: as numbers of the model's dtype, or as 8-bit codes with scales.

A coded entry of so many channels is a signed code for each, a byte of 0 where their number is odd, and a bf16 scale for each
SCALED of them (the last group may be shorter); a channel is code * scale. ops/coded_pages.py makes and reads them.
"""

from __future__ import annotations

SCALED = 64
"""Channels that share a scale."""


def scales_at(width: int) -> int:
    """Where the scales of an entry of so many channels begin, in bytes: at an even place."""
    return width + width % 2


def entry_bytes(width: int) -> int:
    """Bytes of a coded entry."""
    return scales_at(width) + 2 * -(-width // SCALED)
