"""What training a model needs in memory, told before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.fit import Ladder, Step, Verdict, halved, judge
from lineshaft.model.memory import Kept, Memory, Packing, Terms
from lineshaft.train.loop import AUTO, Precision

CODE_BYTES = 24 << 20
"""Code and buffers of PyTorch's math libraries that come into memory with the first products (docs/preflight.md)."""
HOLES = 0.1
"""Share of what a step makes and frees that lies unused in the heap, beside the blocks that gradients leave (docs/preflight.md)."""

COMPILED = 1024
"""Products that oneDNN keeps; in bfloat16 it compiles one for each shape, and experts meet ever new ones."""
COMPILED_BYTES = COMPILED << 20
"""About a MiB each."""
LEAST_TOKENS = 64
"""No shorter rows are proposed."""


@dataclass(frozen=True)
class Training:
    """What is to be trained, in what steps."""

    model: ModelConfig
    rows: int
    sequence_tokens: int
    accumulate: int = 1
    precision: str = "auto"

    @property
    def settled(self) -> Precision:
        """The precision, `auto` replaced by what it means here."""
        if self.precision == "auto":
            return AUTO
        return "bfloat16" if self.precision == "bfloat16" else "float32"


def train_memory(given: Training) -> Memory:
    """A step once AdamW has its moments: at the loss, and on the way back behind each layer.

    Which documents a batch holds decides how attention keeps them apart; the dearest way is counted.
    """
    packings: tuple[Packing, ...] = ("whole", "mask", "alone")
    tokens = given.rows * given.sequence_tokens
    kept = [Kept(given.model, tokens, given.sequence_tokens, given.settled == "bfloat16", packing) for packing in packings]
    dearest = max(kept, key=Kept.total)
    lasting = _lasting(given)
    return Memory({name: _with_holes(lasting, terms) for name, terms in _way_back(given, dearest).items()})


def _lasting(given: Training) -> Terms:
    """Held from the first step to the last, in float32."""
    weights = 4 * cost_of(given.model).parameters
    varied = given.settled == "bfloat16" and given.model.moe is not None
    compiled = {"products compiled for each number of rows": COMPILED_BYTES} if varied else {}
    return {"weights": weights, "AdamW's two moments": 2 * weights, **compiled}


def _way_back(given: Training, kept: Kept) -> dict[str, Terms]:
    """Phase to what it holds beside what lasts."""
    tokens, whole = kept.tokens, 4 * cost_of(given.model).parameters
    made, saved = 0, kept.total()
    held_already = whole if given.accumulate > 1 else 0
    phases: dict[str, Terms] = {
        "loss": {
            f"activations of {tokens} tokens": saved,
            "gradients": held_already,
            "loss, on the way back": 2 * 4 * tokens * given.model.vocab_size,
        }
    }
    saved -= kept.head() + sum(kept.prediction(layer) for layer in range(given.model.num_hidden_layers, given.model.all_layers))
    share = whole // given.model.num_hidden_layers
    for layer in reversed(range(given.model.num_hidden_layers)):
        made += share
        held = {f"activations of {tokens} tokens": saved + kept.way_back(layer), "gradients": max(held_already, made)}
        phases[f"way back through layer {layer}"] = held
        saved -= kept.layer(layer)
    # A tied table has a gradient from the head already; the embedding's own is made beside it and then added.
    twice = 4 * given.model.vocab_size * given.model.hidden_size if given.model.tie_word_embeddings else 0
    phases["way back into the embedding"] = {"gradients": whole + twice}
    return phases


def _with_holes(lasting: Terms, fleeting: Terms) -> Terms:
    """The next step's activations do not fit into the blocks that the last one's gradients left, so these lie idle."""
    return {**lasting, **fleeting, "holes in the heap": lasting["weights"] + int(HOLES * sum(fleeting.values()))}


def judge_training(
    given: Training, room: int | None = None, task: str = "train", memory: Callable[[Training], Memory] = train_memory
) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit. `memory`: what a task needs that trains otherwise."""
    return judge(task, given, LADDERS, memory, own_bytes(), room)


def own_bytes() -> int:
    """Bytes of a process that trains, without model and batches."""
    # An optimiser brings compiler modules of PyTorch with it that nothing else needs.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    return resident_memory_bytes() + CODE_BYTES


def _fewer_rows(given: Training) -> Iterator[Step[Training]]:
    """As many tokens a step, in smaller batches whose gradients are added up."""
    rows, accumulate = given.rows, given.accumulate
    while rows % 2 == 0:
        rows, accumulate = rows // 2, accumulate * 2
        yield f"rows={rows} with loop.accumulate={accumulate}", replace(given, rows=rows, accumulate=accumulate)
    if rows > 1:
        told = f"rows=1 with loop.accumulate={accumulate * rows}"
        yield told, replace(given, rows=1, accumulate=accumulate * rows)


def _bfloat16(given: Training) -> Iterator[Step[Training]]:
    """Where it saves memory: what a small model saves, its compiled products take again."""
    changed = replace(given, precision="bfloat16")
    if given.settled == "float32" and train_memory(changed).total < train_memory(given).total:
        yield "loop.precision=bfloat16", changed


def _shorter_rows(given: Training) -> Iterator[Step[Training]]:
    for tokens in halved(given.sequence_tokens, LEAST_TOKENS):
        yield f"sequence_tokens={tokens}", replace(given, sequence_tokens=tokens)


LADDERS: tuple[Ladder[Training], ...] = (_fewer_rows, _bfloat16, _shorter_rows)
"""What can be changed so that training needs less."""
