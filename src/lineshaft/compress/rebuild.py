"""Layers that lost units are trained to give what they gave with them: one after another, on text, without its labels.

Layer by layer the mean square of the difference between what the smaller layer gives for the smaller model's hidden states and what the
whole one gives for the whole model's is made small by AdamW (Li et al. 2021, arXiv 2102.05426, section 3.2, there for rounding). So a
layer also makes up for those before it. All of its weights are trained, and nothing but two layers and the hidden states is looked at.

Shape letters: T tokens, I hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineshaft.base.terminal import bar
from lineshaft.compress.calibrate.parts import HeadPart, Part, parts_of
from lineshaft.compress.calibrate.rows import Surroundings
from lineshaft.model.decoder import Decoder
from lineshaft.train import optimiser
from lineshaft.train.optimiser import OptimiserConfig


@dataclass(frozen=True)
class Rebuilding:
    """How long each layer is trained, and at which highest rate; it falls along half a cosine."""

    steps: int
    lr: float
    seed: int = 1
    """Decides the order of the text."""


def rebuild(smaller: Decoder, whole: Decoder, rows: Sequence[Surroundings], how: Rebuilding) -> tuple[float, float]:
    """Train the layers of `smaller` in place, float32; it keeps no gradients.

    `whole`: a model of as many layers. Returns the mean over layers of the difference, as a share of what the whole layer gives (both
    squared), before and after; a layer that training takes further away stays as it was. A step takes one batch; the hidden states of
    all of them are kept, twice.
    """
    with torch.no_grad():
        wanted = [whole.model.embed_tokens(around.batch.tokens_T) for around in rows]
    hidden, seen = [x_TI.clone() for x_TI in wanted], []
    pairs = [pair for pair in zip(parts_of(smaller), parts_of(whole), strict=True) if not isinstance(pair[0], HeadPart)]
    with bar("rebuild", len(pairs)) as progress:
        for ours, theirs in pairs:
            with torch.no_grad():
                theirs.advance(wanted, list(rows))
            seen.append(_better(ours, hidden, wanted, rows, how))
            with torch.no_grad():
                ours.advance(hidden, list(rows))
            progress.advance(1, ours.names[0])
    return sum(before for before, _ in seen) / len(seen), sum(after for _, after in seen) / len(seen)


def _better(
    part: Part, hidden: list[Tensor], wanted: list[Tensor], rows: Sequence[Surroundings], how: Rebuilding
) -> tuple[float, float]:
    """Train a part, and put back what it was where that was nearer; the difference before and after."""
    before = _difference(part, hidden, wanted, rows)
    parameters = [parameter for name in part.names for parameter in part.model.get_submodule(name).parameters()]
    kept = [parameter.data for parameter in parameters]
    _train(part, hidden, wanted, rows, how)
    after = _difference(part, hidden, wanted, rows)
    if after < before:
        return before, after
    for parameter, tensor in zip(parameters, kept, strict=True):
        parameter.data = tensor
    return before, before


@torch.no_grad()
def _difference(part: Part, hidden: list[Tensor], wanted: list[Tensor], rows: Sequence[Surroundings]) -> float:
    """The square of the difference as a share of the square of what is wanted."""
    missed = sum(float((part.run(x_TI, around) - y_TI).square().sum()) for x_TI, y_TI, around in zip(hidden, wanted, rows, strict=True))
    return missed / max(_power(wanted), torch.finfo(torch.float32).tiny)


def _power(wanted: list[Tensor]) -> float:
    return sum(float(y_TI.square().sum()) for y_TI in wanted)


def _train(part: Part, hidden: list[Tensor], wanted: list[Tensor], rows: Sequence[Surroundings], how: Rebuilding) -> None:
    config = OptimiserConfig(peak_lr=how.lr, final_lr_share=0.0, warmup_share=0.0, weight_decay=0.0)
    module = nn.ModuleList([part.model.get_submodule(name) for name in part.names]).requires_grad_(True)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()  # what was not cut is shared with the whole model
    steps = optimiser.build(module, config)
    scale = sum(y_TI.numel() for y_TI in wanted) / max(_power(wanted), torch.finfo(torch.float32).tiny)
    for step, number in enumerate(_order(len(rows), how)):
        for group in steps.param_groups:
            group["lr"] = optimiser.learning_rate(config, step, how.steps)
        missed = scale * (part.run(hidden[number], rows[number]) - wanted[number]).square().mean()
        steps.zero_grad()
        missed.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        steps.step()
    steps.zero_grad()
    module.requires_grad_(False)


def _order(count: int, how: Rebuilding) -> list[int]:
    """Batches of all steps: each epoch a permutation of all of them."""
    luck, order = torch.Generator().manual_seed(how.seed), list[int]()
    while len(order) < how.steps:
        order += torch.randperm(count, generator=luck).tolist()
    return order[: how.steps]
