"""Distillation: a student learns how likely its teacher finds every token, not only which one came.

Hinton, Vinyals and Dean, arXiv 1503.02531.

Shape letters: T packed tokens, V vocabulary, I width of the student's hidden states, J of the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lineshaft.base.errors import ConfigError
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import resized
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import Loss, NextToken, cross_entropy

MAPS = "hidden_maps"
"""Where the student carries the maps of hidden states while it is trained, so that optimiser and resumable states find them."""


# -- the student --------------------------------------------------------------------------------------------------------


def evenly_spaced(keep: int, layers: int) -> tuple[int, ...]:
    """`keep` of so many layers, the first and the last among them, gaps as equal as whole numbers can be; of one, the first."""
    steps = max(1, keep - 1)
    return tuple((2 * place * (layers - 1) + steps) // (2 * steps) for place in range(keep))


def cut_config(teacher: ModelConfig, keep: int) -> ModelConfig:
    """The description of a student with `keep` evenly spaced layers of the teacher's. ConfigError where it has fewer."""
    if not 0 < keep <= teacher.num_hidden_layers:
        raise ConfigError(f"keep_layers: {keep} of a teacher's {teacher.num_hidden_layers} layers can't be kept: ask for fewer")
    layers = range(teacher.num_hidden_layers)
    return resized(teacher, {"num_hidden_layers": keep}, set(layers) - set(evenly_spaced(keep, len(layers))))


@torch.no_grad()
def cut(teacher: Decoder, keep: int) -> Decoder:
    """A student that begins as `keep` evenly spaced layers of the teacher between its embedding and its head, dense, in float32.

    As DistilBERT is made (Sanh et al., arXiv 1910.01108, section 3). Prediction layers stay. A compressed teacher's weights are decoded.
    Raises ConfigError for more layers than there are.
    """
    student = Decoder(cut_config(teacher.config, keep))
    layers = teacher.config.num_hidden_layers
    further = range(layers, teacher.config.all_layers)
    source = dict(enumerate([*evenly_spaced(keep, layers), *further]))
    linears, others = teacher.linears(), teacher.state_dict()
    for name, tensor in student.state_dict().items():
        theirs = _renumbered(name, source)
        module, _, kind = theirs.rpartition(".")
        decoded = kind == "weight" and module in linears
        tensor.copy_(linears[module].dense_weight(torch.float32) if decoded else others[theirs])
    return student


def _renumbered(name: str, source: Mapping[int, int]) -> str:
    """`model.layers.1.mlp...` as `model.layers.{source[1]}.mlp...`; other names as they are."""
    head, layers, rest = name.partition("model.layers.")
    number, dot, tail = rest.partition(".")
    return f"{head}{layers}{source[int(number)]}{dot}{tail}" if layers else name


# -- the objective ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """What the parts of the loss count for."""

    alpha: float = 0.5
    """Share of the teacher's chances; the next token has the rest."""
    temperature: float = 2.0
    """Both sides' logits are divided by it."""
    hidden_weight: float = 0.0
    """Of the hidden states' mean squared error; 0: they are not compared."""
    further_weight: float = 0.3
    """Of the prediction layers' loss, see NextToken."""


def softened(logits_TV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [T, V] at a temperature: log softmax(logits / temperature). Numbers shorter than float32 become float32."""
    wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return torch.log_softmax(wide_TV / temperature, -1)


def divergence(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Kullback-Leibler, nats [T]: what the student's log-probabilities [T, V] lose on the teacher's, sum p (log p - log q)."""
    return nn.functional.kl_div(student_TV, teacher_TV, reduction="none", log_target=True).sum(-1)


def hidden_error(student_TI: Tensor, teacher_TJ: Tensor, map_JI: Tensor | None) -> Tensor:
    """Mean squared difference [T] over the teacher's J channels; the student's go through the map first, where there is one."""
    near_TJ = student_TI if map_JI is None else student_TI @ map_JI.T
    wide = torch.float64 if near_TJ.dtype == torch.float64 else torch.float32
    return (near_TJ.to(wide) - teacher_TJ.to(wide)).square().mean(-1)


def pairs_of(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's layer) whose outputs are compared: those at the same share of the depth, the last ones among them.

    As many as the shallower one has; TinyBERT's uniform mapping (Jiao et al., arXiv 1909.10351, section 3.1), for either being deeper.
    """
    count = min(student_layers, teacher_layers)
    return tuple(((step * student_layers) // count - 1, (step * teacher_layers) // count - 1) for step in range(1, count + 1))


def fresh_maps(student_width: int, teacher_width: int, count: int, seed: int) -> nn.ParameterList:
    """`count` linear maps [J, I], float32, normal with variance 1 / I; equal for equal seeds. None where the widths are the same."""
    shape, places = (teacher_width, student_width), range(count if student_width != teacher_width else 0)
    drawn = [np.random.default_rng([seed, place]).standard_normal(shape, np.float32) for place in places]
    return nn.ParameterList([nn.Parameter(torch.from_numpy(map_JI) / student_width**0.5) for map_JI in drawn])


class Distil:
    """(1 - alpha) next token + alpha temperature^2 KL(teacher || student) + hidden_weight hidden states' error.

    Each is a sum over the positions that predict something. The factor temperature^2 keeps the gradient of the second part as large as it
    is at 1 (section 2). What prediction layers cost is added as in NextToken: no teacher tells them anything. The teacher runs
    without gradients and in its own dtype, batch by batch.
    """

    def __init__(self, teacher: Decoder, student: Decoder, mixture: Mixture, seed: int = 0) -> None:
        self.teacher, self.mixture = teacher.eval().requires_grad_(False), mixture
        self.next_token = NextToken(mixture.further_weight)
        pairs = pairs_of(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        self.pairs = pairs if mixture.hidden_weight else ()
        self.maps = fresh_maps(student.config.hidden_size, teacher.config.hidden_size, len(self.pairs), seed)

    @contextmanager
    def learning(self, student: Decoder) -> Iterator[None]:
        """Inside, the maps are parameters of the student: trained, saved and restored with it. Afterwards they are gone."""
        student.add_module(MAPS, self.maps)
        try:
            yield
        finally:
            delattr(student, MAPS)

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        """See Objective. `model` is the student, inside `learning`."""
        assert getattr(model, MAPS, None) is self.maps  # else nothing would train them
        attend = PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row)
        counted_T = batch.targets_T != IGNORE
        teacher_TV, wanted = self._taught(batch, attend)
        with _outputs_of(model, [student for student, _ in self.pairs]) as got:
            hidden_TI = model.hidden(batch.tokens_T, batch.positions_T, attend)
        logits_TV = model.logits(hidden_TI)
        main = cross_entropy(logits_TV, batch.targets_T)
        total = (1 - self.mixture.alpha) * main
        if teacher_TV is not None:
            student_TV = softened(logits_TV, self.mixture.temperature)
            weight = self.mixture.alpha * self.mixture.temperature**2
            total = total + weight * divergence(teacher_TV, student_TV)[counted_T].sum()
        for place, (near_TI, far_TJ) in enumerate(zip(got, wanted, strict=True)):
            error_T = hidden_error(near_TI, far_TJ, self.maps[place] if len(self.maps) else None)
            total = total + self.mixture.hidden_weight / len(self.pairs) * error_T[counted_T].sum()
        further = self.next_token.further(model, batch, hidden_TI, attend)
        return Loss(total if further is None else total + further, main)

    @torch.no_grad()
    def _taught(self, batch: Batch, attend: PackedCausal) -> tuple[Tensor | None, list[Tensor]]:
        """The teacher's softened log-probabilities, unless nobody asks for them, and its hidden states."""
        with torch.autocast("cpu", enabled=False), _outputs_of(self.teacher, [teacher for _, teacher in self.pairs]) as wanted:
            hidden_TJ = self.teacher.hidden(batch.tokens_T, batch.positions_T, attend)
            if not self.mixture.alpha:
                return None, wanted
            return softened(self.teacher.logits(hidden_TJ), self.mixture.temperature), wanted


@contextmanager
def _outputs_of(model: Decoder, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """What these layers give while the model runs inside, in their order."""
    found: list[Tensor] = []
    handles = [model.model.layers[layer].register_forward_hook(lambda _module, _given, made: found.append(made)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
