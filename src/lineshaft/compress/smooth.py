"""Moving outliers of activations into weights: SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth and Han, arXiv 2211.10438, section 4).

A few channels of activations are many times as large as the others, and one scale a token leaves the others few codes. Divided
by s along a junction, and the columns that read them multiplied by it, the model computes the same and both sides can be rounded.

Shape letters: C channels of a junction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError
from lineshaft.model.decoder import Decoder
from lineshaft.model.junction import Junction, dense_weight, scale
from lineshaft.model.norm import RmsNorm


def smoothing(amax_C: Tensor, weight_C: Tensor, alpha: float = 0.5) -> Tensor:
    """s of equation 4, float32 [C]: amax^alpha / weight^(1 - alpha).

    amax_C: the largest magnitude of each channel on calibration inputs. weight_C: that of the columns that read it (`largest_read`).
    alpha: how much of the difficulty goes into the weights; the paper has 0.5 for most models and 0.75 for those with more
    outliers. 1 for a channel that was always zero or that nothing reads: there is nothing to move. Raises ConfigError for an alpha
    outside [0, 1], for shapes that differ, and for maxima that are negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: {alpha} is not a share between 0 and 1")
    if amax_C.shape != weight_C.shape:
        raise ConfigError(f"maxima of {list(amax_C.shape)} channels do not fit the {list(weight_C.shape)} that are read")
    amax_C, weight_C = amax_C.float(), weight_C.to(amax_C.device, torch.float32)
    if not all((torch.isfinite(found) & (found >= 0)).all() for found in (amax_C, weight_C)):
        raise ConfigError("maxima must be finite and not negative: look for overflows among the calibration inputs or the weights")
    dead_C = (amax_C == 0) | (weight_C == 0)
    return (amax_C**alpha / weight_C ** (1 - alpha)).masked_fill(dead_C, 1.0)


@torch.no_grad()
def largest_read(model: Decoder, junction: Junction) -> Tensor:
    """The largest magnitude among the weights that read each channel, over all readers, float32 [C]. Dense weights only: ConfigError."""
    found = [port.largest(dense_weight(model, port).float().abs().amax(0), junction.channels) for port in junction.readers]
    return torch.stack(found).amax(0)


def smooth(
    model: Decoder, maxima: Mapping[str, Tensor], alpha: float = 0.5, norms_only: bool = True, among: Sequence[Junction] | None = None
) -> dict[str, Tensor]:
    """Scale along junctions, all of the model's or `among` these, by `smoothing`, in place; returns each junction's s by its name.

    maxima: from a junction's name to the largest magnitude of each of its channels on calibration inputs, [C]. `norms_only`: only
    where a norm writes, as in the paper, since norms have nothing to be rounded; maxima of other junctions are then not used. Without it
    the rows of v, up and the value half of kv_b are divided as well. Raises ConfigError, before anything is scaled, for a junction that
    has no maxima, a name that is no junction, a layer that is compressed already, and what `smoothing` refuses. A weight that would
    be too large for its dtype ends it half-way, as `scale` refuses it; the model computes what it did even then.
    """
    junctions = {junction.name: junction for junction in (model.junctions() if among is None else among)}
    for name in sorted(maxima.keys() - junctions.keys()):
        raise ConfigError(f'smooth: "{name}" is no junction of this model; its junctions are named like {next(iter(junctions))}')
    chosen = {name: junction for name, junction in junctions.items() if not norms_only or _after_norm(model, junction)}
    # All before the first is scaled: rows that one junction divides lie in columns that another looks at. It also finds every layer
    # that is compressed, writers as well, since each of these reads from a norm.
    scales = {name: _smoothing_of(model, junction, maxima, alpha) for name, junction in chosen.items()}
    for name, s_C in scales.items():
        scale(model, chosen[name], s_C)
    return scales


def _after_norm(model: Decoder, junction: Junction) -> bool:
    return all(isinstance(model.get_submodule(port.module), RmsNorm) for port in junction.writers)


def _smoothing_of(model: Decoder, junction: Junction, maxima: Mapping[str, Tensor], alpha: float) -> Tensor:
    if junction.name not in maxima:
        raise ConfigError(f"smooth: {junction.name} has no maxima: calibrate with inputs that reach it")
    try:
        return smoothing(maxima[junction.name], largest_read(model, junction), alpha)
    except ConfigError as error:
        raise ConfigError(f"smooth: {junction.name}: {error}") from None
