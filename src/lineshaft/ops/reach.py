"""Which earlier tokens a token sees: data that a model's description carries and attention kernels read. Free of torch.

Positions count from 0 inside one document or request. Nobody ever sees the future. `visible` works on whole numbers and on
anything that compares and subtracts like them, such as integer tensors that broadcast.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from lineshaft.base.config import Config

Span = tuple[int, int]
"""Positions from the first to before the second."""


class Causal(Config):
    """Everything before it, and itself."""

    kind: Literal["causal"] = "causal"

    def visible(self, q: Any, k: Any) -> Any:
        """May the token at position q see the one at position k?"""
        return k <= q

    def spans(self, first: int, last: int) -> list[Span]:
        """Disjoint ascending spans that hold every position seen from first to last - 1 (and perhaps others)."""
        return [(0, last)]

    def pairs(self, tokens: int) -> int:
        """Pairs (q, k) of a document of that many tokens in which q sees k: what its attention costs."""
        return tokens * (tokens + 1) // 2


class Window(Config):
    """The nearest tokens, and the first ones of the document (Longformer, arXiv 2004.05150, section 3.1, causal).

    Global tokens at the start are also what StreamingLLM (arXiv 2309.17453) calls attention sinks.
    """

    kind: Literal["window"] = "window"
    window: PositiveInt
    """A token sees itself and the window - 1 tokens before it."""
    global_tokens: int = Field(0, ge=0)
    """Every token sees that many tokens at the start of its document as well."""

    def visible(self, q: Any, k: Any) -> Any:
        """See Causal."""
        return (k <= q) & ((q - k < self.window) | (k < self.global_tokens))

    def spans(self, first: int, last: int) -> list[Span]:
        """See Causal."""
        start = max(0, first - self.window + 1)
        head = min(self.global_tokens, last)
        return [(0, head), (start, last)] if 0 < head < start else [(0 if head else start, last)]

    def pairs(self, tokens: int) -> int:
        """See Causal. Without global tokens n w - w(w - 1)/2 for n >= w."""
        far = max(0, tokens - self.window)  # tokens that have something behind their window: 1, 2, ... far of it
        near, few = tokens - far, min(far, self.global_tokens)
        return near * (near + 1) // 2 + far * self.window + few * (few + 1) // 2 + (far - few) * self.global_tokens


class Blocks(Config):
    """Whole blocks of tokens: the nearest, and every stride-th from the first on (Sparse Transformer, arXiv 1904.10509)."""

    kind: Literal["blocks"] = "blocks"
    block: PositiveInt
    """Tokens in a block."""
    local_blocks: PositiveInt = 1
    """A token sees its own block and the local_blocks - 1 before it."""
    stride: PositiveInt
    """It sees blocks 0, stride, 2 stride, ... as well."""

    def visible(self, q: Any, k: Any) -> Any:
        """See Causal."""
        q_block, k_block = q // self.block, k // self.block
        return (k <= q) & ((q_block - k_block < self.local_blocks) | (k_block % self.stride == 0))

    def spans(self, first: int, last: int) -> list[Span]:
        """See Causal."""
        nearest = max(0, first // self.block - self.local_blocks + 1)
        found = [(b * self.block, (b + 1) * self.block) for b in range(0, nearest, self.stride)]
        return _joined([*found, (nearest * self.block, last)])

    def pairs(self, tokens: int) -> int:
        """See Causal."""
        total = 0
        for start in range(0, tokens, self.block):
            size, own = min(self.block, tokens - start), start // self.block
            seen = self._blocks_before(own)
            total += size * seen * self.block + size * (size + 1) // 2
        return total

    def _blocks_before(self, own: int) -> int:
        """Blocks before its own that a token of block `own` sees."""
        local = min(own, self.local_blocks - 1)
        return local + -(-(own - local) // self.stride)


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbouring spans made one."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


Reach = Annotated[Causal | Window | Blocks, Field(discriminator="kind")]
