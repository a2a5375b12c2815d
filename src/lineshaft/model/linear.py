"""A linear layer whose weight may be stored in any format. Compression changes the weight, never the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineshaft.ops.formats import DENSE, Format
from lineshaft.ops.packed import PackedHeads, packed_heads_of, packed_of


class Linear(nn.Module):
    """y = x W^T + b, W in the layer's format.

    The tensors of the format are the module's own parameters or buffers under their checkpoint names (`weight` when
    dense), so saving and loading need no mapping.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format: Format = DENSE
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return self.format.matmul(x_TI, self.tensors(), self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.format.tensor_names}

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the product uses."""
        return self.format.decode(self.tensors(), dtype)

    def recode(self, fmt: Format) -> None:
        """Store the weight in another format; what the product computes becomes that format's rounding of it."""
        self.hold(fmt, fmt.encode(self.dense_weight(torch.float32)))

    def dequantise(self, dtype: torch.dtype) -> None:
        """Hold the weight that the product uses as a dense one; nothing to do where it is dense."""
        if self.format != DENSE:
            self.hold(DENSE, {"weight": self.dense_weight(dtype)})

    def pack(self, wide: bool = False) -> None:
        """Lay the weight out for the native kernels, where they can take it; such a layer can't be saved. `wide`: results are float32."""
        if (found := packed_of(self.format, self.tensors(), wide)) is not None:
            self.hold(found[0], {"packed": found[1]})
            if self.bias is not None:
                self.bias = nn.Parameter(self.bias.float(), requires_grad=False)  # as the kernels add it

    def pack_by_head(self, heads: int, nope: int, dtype: torch.dtype) -> None:
        """The same for an up-projection of latent attention, for products with each head's halves in this dtype."""
        if isinstance(self.format, PackedHeads):
            return
        if (found := packed_heads_of(self.format, self.dense_weight(dtype), heads, nope)) is not None:
            self.hold(*found)

    def reserve(self, fmt: Format) -> None:
        """Make room for a weight in this format, to be loaded from a checkpoint."""
        self.hold(fmt, fmt.empty(self.out_features, self.in_features))

    def hold(self, fmt: Format, tensors: dict[str, Tensor]) -> None:
        """Take these tensors for the weight; a dense one, and those that are parameters already, can be trained."""
        for name in self.format.tensor_names:
            delattr(self, name)
        for name, tensor in tensors.items():
            if fmt == DENSE or isinstance(tensor, nn.Parameter):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.format = fmt
