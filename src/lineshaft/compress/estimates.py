"""How much a model is hurt when one unit of it is stored in fewer bits: two estimates from gradients of what `divergences` measures.

Near no change the divergence of next-token chances is e^T F e / 2 for a change e of the weights, F being the Fisher information (Martens,
arXiv 1412.1193). Of F only the diagonal is taken, as Optimal Brain Damage takes that of the Hessian (LeCun, Denker and Solla 1989,
equation 3): rounding errors of different weights have little to do with each other. HAWQ (Dong et al., arXiv 1905.03696 and 1911.03852)
weighs the squared error of a whole layer by one number, the largest eigenvalue or the mean trace.

Shape letters: T tokens, V vocabulary, I inputs, O outputs, R rows that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.base.terminal import bar
from lineshaft.compress.sensitivity import Damage, at_rest, offered, targets_of
from lineshaft.compress.ties import Unit, linear_of
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.mla import IndexerBlock
from lineshaft.ops.formats import Format
from lineshaft.train.batches import IGNORE, Batch

Labels = Callable[[Tensor, Tensor, int], Tensor]
"""From logits [R, V], the text's own next tokens [R] and the number of the batch to the tokens whose chance is differentiated [R]."""


def fisher(model: Decoder, batches: Sequence[Batch], units: Sequence[Unit], formats: Sequence[str]) -> Damage:
    """Estimate `divergences` by sum(F e^2) / 2 over a unit's weights: e what rounding changes, F the diagonal of the Fisher information.

    F is the expected square of the gradient of log p(y), y drawn from the model's own chances and not taken from the text. Gradients of
    different tokens have then mean zero and nothing in common, so the square of a batch's summed gradient is what is wanted: one
    backward pass a batch. Holds two float32 numbers a weight. Raises ConfigError as `divergences` does, for formats that round
    activations, and for an indexer, which no gradient reaches.
    """
    forms = _weights_only(model, units, formats)
    sums, targets = _summed(model, batches, units, _drawn, torch.square), targets_of(batches)
    return _rated(model, units, forms, lambda name, error_OI: float((sums[name] * error_OI**2).sum()) / (2 * targets), sum)


def gradient(model: Decoder, batches: Sequence[Batch], units: Sequence[Unit], formats: Sequence[str]) -> Damage:
    """Norm of the gradient of the mean loss on the text times the norm of what rounding changes, both over a unit's weights.

    Raises ConfigError as `fisher` does.
    """
    forms = _weights_only(model, units, formats)
    sums, targets = _summed(model, batches, units, _of_the_text, torch.clone), targets_of(batches)
    steep = {unit.name: sum(float(sums[name].square().sum()) for name in unit.layers) ** 0.5 / targets for unit in units}
    far = _rated(model, units, forms, lambda _, error_OI: float((error_OI**2).sum()), lambda squares: sum(squares) ** 0.5)
    return {unit: {name: steep[unit] * norm for name, norm in of_unit.items()} for unit, of_unit in far.items()}


def _weights_only(model: Decoder, units: Sequence[Unit], formats: Sequence[str]) -> dict[str, dict[str, Format]]:
    """Those offered, where gradients of weights tell of them."""
    if rounding := [name for name in formats if name.endswith("-a8")]:
        raise ConfigError(f"{rounding[0]} rounds activations, which gradients of weights tell nothing of: measure it by kl")
    choosing = tuple(f"{at}." for at, module in model.named_modules() if isinstance(module, IndexerBlock))
    for name in (name for unit in units for name in unit.layers):
        if choosing and name.startswith(choosing):
            raise ConfigError(f"{name}: an indexer chooses, so no gradient reaches it: measure by kl, or skip it")
    return offered(model, units, formats)


def _summed(
    model: Decoder, batches: Sequence[Batch], units: Sequence[Unit], labels: Labels, of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """`of` the gradient [O, I] of each batch's summed cross-entropy for those labels, summed in float32, for each layer of the units."""
    weights = {name: linear_of(model, name).weight for unit in units for name in unit.layers}
    sums = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}
    with bar("gradients", len(batches)) as progress, at_rest(model), _differentiable(list(weights.values())):
        for number, batch in enumerate(batches):
            loss = _cross_entropy(model, batch, labels, number)
            found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)  # experts that no token chose have none
            for name, gradient_OI in zip(weights, found, strict=True):
                sums[name] += of(gradient_OI.float())
            progress.advance()
    return sums


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)


def _cross_entropy(model: Decoder, batch: Batch, labels: Labels, number: int) -> Tensor:
    rows_R = (batch.targets_T != IGNORE).nonzero()[:, 0]
    hidden_TI = model.hidden(batch.tokens_T, batch.positions_T, PackedCausal(batch.starts_D, len(batch.tokens_T), batch.row))
    logits_RV = model.logits(hidden_TI[rows_R]).float()
    return F.cross_entropy(logits_RV, labels(logits_RV.detach(), batch.targets_T[rows_R], number), reduction="sum")


def _drawn(logits_RV: Tensor, _: Tensor, number: int) -> Tensor:
    generator = torch.Generator(logits_RV.device).manual_seed(number)
    return torch.multinomial(F.softmax(logits_RV, -1), 1, generator=generator)[:, 0]


def _of_the_text(_: Tensor, targets_R: Tensor, __: int) -> Tensor:
    return targets_R


def _rated(
    model: Decoder,
    units: Sequence[Unit],
    forms: Mapping[str, Mapping[str, Format]],
    rate: Callable[[str, Tensor], float],
    joined: Callable[[list[float]], float],
) -> Damage:
    """`joined` of the `rate` that each layer of a unit gets for its change [O, I], by unit and format."""
    found: Damage = {unit.name: {} for unit in units}
    for unit in units:
        linears = {name: linear_of(model, name) for name in unit.layers}
        for name, fmt in forms[unit.name].items():
            errors = ((layer, _rounded(linear, fmt) - linear.weight.detach().float()) for layer, linear in linears.items())
            found[unit.name][name] = joined([rate(layer, error_OI) for layer, error_OI in errors])
    return found


def _rounded(linear: Linear, fmt: Format) -> Tensor:
    """What the weight becomes, float32 [O, I]."""
    return fmt.decode(fmt.encode(linear.weight.detach().float()), torch.float32)
