"""Junctions: channels that some modules write and others read, so that they are scaled, cut or sharded together.

Each block lists its own, once, from the modules it has; `Decoder.junctions` puts them together. A junction stands where
scaling is exact: with the rows of the writers divided by s and the columns of the readers multiplied by s, for any s > 0,
the model computes what it did. Where something else reads the channels, or reads them in another way, there is none:

- from q and k to the scores: rotation mixes the channels of a pair, and the norms of heads (qk_norm) undo a scale.
- from the residual stream to the norms that read it: they divide by the root mean square over all channels.
- from an indexer's wk and wq_b to its scores: LayerNorm takes a mean over all channels, ReLU stands behind.
- from the final norm to the head, where the head is the embedding table, or where prediction layers norm the same channels.

Shape letters: C channels of a junction, R rows (of a writer) or columns (of a reader).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineshaft.base.errors import ConfigError
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import DENSE


@dataclass(frozen=True, eq=False)  # tensors have no truth of being equal
class Port:
    """Where a junction's channels lie in one module."""

    module: str
    """Its name below the model, such as model.layers.0.mlp.up_proj."""
    channel_R: Tensor | None = None
    """int64: the channel of each row (writers, gates) or column (readers) of its weight; -1: none of them. None: channel by channel."""

    def spread(self, values_C: Tensor) -> Tensor:
        """A value a channel as a value a row or column [R]; 1 where there is none of the channels."""
        if self.channel_R is None:
            return values_C
        return F.pad(values_C, (0, 1), value=1.0)[self.channel_R.to(values_C.device)]  # -1 finds the last

    def largest(self, values_R: Tensor, channels: int) -> Tensor:
        """Of a value >= 0 a row or column, the largest of each channel [C]; 0 for a channel that lies nowhere here."""
        if self.channel_R is None:
            return values_R
        found = values_R.new_zeros(channels + 1)
        found.scatter_reduce_(0, self.channel_R.to(values_R.device) % (channels + 1), values_R, "amax")  # -1 goes to the last
        return found[:channels]


@dataclass(frozen=True, eq=False)
class Junction:
    """Channels between modules that write them and modules that read them."""

    name: str
    """Unique in the model, such as model.layers.0.mlp.intermediate; where a norm writes, the name of the norm."""
    channels: int
    writers: tuple[Port, ...]
    """Each makes all of its channels, linearly in its rows: weight and bias; of a norm, the weight."""
    readers: tuple[Port, ...]
    """All that take them in, by the columns of a weight [O, R]; not only `Linear`, but routers and gates as well."""
    gates: tuple[Port, ...] = ()
    """Written as well, but not linearly (SwiGLU's gate): cut along with the others, never scaled."""


def ports(prefix: str, *names: str) -> tuple[Port, ...]:
    """Ports of modules below `prefix` that hold the channels in their order."""
    return tuple(Port(f"{prefix}.{name}") for name in names)


@torch.no_grad()
def scale(model: nn.Module, junction: Junction, s_C: Tensor) -> None:
    """Divide the writers' rows by s and multiply the readers' columns by s, in place: what the model computes stays.

    s_C: [C], positive. Computed in float32 and rounded once to the dtype of each weight; powers of two lose nothing. The channels
    themselves become 1 / s of what they were: `Decoder.hidden` shows that of model.norm. Dense weights only. Raises
    ConfigError naming a layer that is compressed or packed, for an s that does not fit, and for a weight that would not be finite
    in its dtype; the model is then as it was.
    """
    if s_C.shape != (junction.channels,):
        raise ConfigError(f"{junction.name} has {junction.channels} channels: scale it by [{junction.channels}], not {list(s_C.shape)}")
    if not (torch.isfinite(s_C) & (s_C > 0)).all():
        raise ConfigError(f"{junction.name}: scales must be finite and above zero")
    for name, tensor, scaled in _scaled(model, junction, s_C):
        if not torch.isfinite(scaled).all():
            raise ConfigError(f"{name}: scaled by {junction.name} it is not finite in {tensor.dtype}: take scales nearer to 1")
    for _, tensor, scaled in _scaled(model, junction, s_C):  # once more, not kept: the experts of a layer are gigabytes
        tensor.copy_(scaled)


def dense_weight(model: nn.Module, port: Port) -> Tensor:
    """The weight itself of a port's module, [R] of a norm, else [O, I]. Raises ConfigError where it is compressed or packed."""
    module = model.get_submodule(port.module)
    if isinstance(module, Linear) and module.format != DENSE:
        told = "scale the checkpoint that it was made from"
        raise ConfigError(f"{port.module} is stored as {module.format.describe()}, only dense weights can be scaled: {told}")
    if getattr(module, "packed", None) is not None:  # routers and gates keep their weight beside the packed one
        raise ConfigError(f"{port.module} is packed for serving, only dense weights can be scaled: load the checkpoint anew")
    assert isinstance(module.weight, Tensor)
    return module.weight


def _scaled(model: nn.Module, junction: Junction, s_C: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module's name, tensor, what it is to become, in its dtype) of everything that `scale` changes."""
    for port in junction.writers:
        weight = dense_weight(model, port)
        s_R = port.spread(s_C.to(weight.device, torch.float32))
        yield port.module, weight, (weight.float() / (s_R[:, None] if weight.ndim == 2 else s_R)).to(weight.dtype)
        bias = getattr(model.get_submodule(port.module), "bias", None)
        if bias is not None:
            yield port.module, bias, (bias.float() / s_R).to(bias.dtype)
    for port in junction.readers:
        weight = dense_weight(model, port)
        yield port.module, weight, (weight.float() * port.spread(s_C.to(weight.device, torch.float32))).to(weight.dtype)
