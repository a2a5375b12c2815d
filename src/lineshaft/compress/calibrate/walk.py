"""Going through a model part by part, changing each by what comes into it; killed, it goes on after the last part done.

What is needed is the tensors of one part, twice, and the hidden states of the calibration text, once: parts that are done lie on disk and
are mapped from there, those to come are mapped from the checkpoint (docs/compression.md, "Calibration").

    <folder>/part-0003/    state.safetensors (its tensors, and scales found), files.json (hashes); renamed into place when whole
    <folder>/hidden-0003/  the hidden states after it, of the newest part only
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lineshaft.base.machine import large_blocks_returned
from lineshaft.base.terminal import bar
from lineshaft.compress.calibrate import kept
from lineshaft.compress.calibrate.observe import Inputs, Wanted
from lineshaft.compress.calibrate.parts import Part, parts_of
from lineshaft.compress.calibrate.rows import Surroundings
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Format

Scales = dict[str, Tensor]
"""Junction to what its channels were divided by."""
LARGE = 8 << 20
"""Bytes of a block that goes back to the system when freed. Left in the heap, those of wide blocks had it hold twice what was in use."""


class Method(Protocol):
    """What is done to each part."""

    name: ClassVar[str]
    wanted: ClassVar[Wanted]
    changes_outputs: ClassVar[bool]
    """Later parts are to see what this one gives once changed. Else they see what it gave before, which saves a run."""

    def format_of(self, layer: str) -> Format:
        """How a linear layer is stored when its part is done."""

    def watched(self, part: Part) -> dict[str, Linear]:
        """The layers whose inputs are looked at."""

    def treat(self, part: Part, seen: Mapping[str, Inputs]) -> Scales:
        """Change the part in place; returns what its junctions were scaled by."""


@torch.no_grad()
def walk(model: Decoder, rows: list[Surroundings], method: Method, folder: Path) -> tuple[Scales, list[str]]:
    """Change the model in place; returns all scales, in order, and watched layers that no token came to."""
    parts = parts_of(model)
    done, scales, unseen = _resume(parts, method, folder)
    hidden = kept.hidden(folder, done) if done else [model.model.embed_tokens(around.batch.tokens_T) for around in rows]
    with bar(method.name, len(parts), done=done) as progress, large_blocks_returned(LARGE):
        for number, part in enumerate(parts[done:], done + 1):
            _own(part)
            watched = method.watched(part)
            seen = part.observe(hidden, rows, watched, method.wanted, advance=not method.changes_outputs)
            found = method.treat(part, seen)
            missed = sorted(watched.keys() - seen.keys())
            del seen  # Hessians are large, and the next part's come before this name is bound anew
            if method.changes_outputs:
                part.advance(hidden, rows)
            kept.save(folder, number, _tensors(part), found, missed, hidden)
            _take(part, method, kept.tensors(folder, number)[0])
            scales, unseen = scales | found, unseen + missed
            progress.advance(1, part.names[-1])
    return scales, unseen


def _resume(parts: list[Part], method: Method, folder: Path) -> tuple[int, Scales, list[str]]:
    """Parts that are done already, taken over from disk."""
    done = kept.done(folder, len(parts))
    scales: Scales = {}
    unseen: list[str] = []
    for number, part in enumerate(parts[:done], 1):
        tensors, found, missed = kept.tensors(folder, number)
        _take(part, method, tensors)
        scales |= found
        unseen += missed
    return done, scales, unseen


def _tensors(part: Part) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in part.model.state_dict().items() if part.holds(name)}


def _own(part: Part) -> None:
    """Let the part's dense weights lie in memory of their own, which is free once they are replaced.

    A page of a mapped file that was written to stays in memory as long as anything of the file is mapped, and so would every layer
    that a method scales in place.
    """
    for module in (module for _, module in part.modules()):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()


def _take(part: Part, method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Let the part's modules hold these tensors instead of their own, which leave memory."""
    for name, linear in part.linears().items():
        fmt = method.format_of(name)
        linear.hold(fmt, {own: tensors[f"{name}.{own}"] for own in fmt.tensor_names})
    for name, parameter in part.model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]
