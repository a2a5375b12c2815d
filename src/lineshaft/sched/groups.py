"""Which layers keep their keys together: those that see alike share pages, so that a page is freed when none of them sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lineshaft.ops.reach import Causal, Reach, Window


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one reach. Each group has a page pool and page tables of its own."""

    reach: Reach
    layers: tuple[int, ...]

    @property
    def forgets(self) -> bool:
        """Are there tokens that later ones never see again?"""
        return not isinstance(self.reach, Causal)

    def seen_pages(self, position: int, page_tokens: int) -> set[int]:
        """Places in the page table that the token at `position`, or any after it, may look back at.

        Tokens only ever drop out of sight, so what the next one does not see no later one does.
        """
        spans = self.reach.spans(position, position + 1)
        return {page for start, stop in spans for page in range(start // page_tokens, -(-stop // page_tokens))}

    def most_pages(self, tokens: int, step_tokens: int, page_tokens: int) -> int:
        """Most pages that a request of so many tokens holds at once, when a step adds at most `step_tokens`."""
        whole = -(-tokens // page_tokens)
        if not isinstance(self.reach, Window):
            return whole
        near = -(-(self.reach.window + step_tokens) // page_tokens) + 1  # one more where it straddles a border
        return min(whole, near + -(-self.reach.global_tokens // page_tokens))


def layer_groups(reaches: Sequence[Reach]) -> list[LayerGroup]:
    """The groups of a model whose layer i has reaches[i], in the order of their first layers."""
    layers: dict[Reach, list[int]] = {}
    for layer, reach in enumerate(reaches):
        layers.setdefault(reach, []).append(layer)
    return [LayerGroup(reach, tuple(own)) for reach, own in layers.items()]
