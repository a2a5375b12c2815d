"""The feed-forward block: SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lineshaft.model.fused import added, swiglu
from lineshaft.model.junction import Junction, Port, ports
from lineshaft.model.linear import Linear
from lineshaft.model.units import Place, Size, Units, rows


class FeedForward(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias)
        self.up_proj = Linear(hidden, width, bias)
        self.down_proj = Linear(width, hidden, bias)

    def forward(self, x_TI: Tensor, onto_TI: Tensor | None = None) -> Tensor:
        """[T, hidden] to [T, hidden]; `onto_TI`: what it is added to."""
        middle_TW = swiglu(x_TI, self.gate_proj, self.up_proj)
        return self.down_proj(middle_TW) if onto_TI is None else added(onto_TI, self.down_proj, middle_TW)

    def readers(self, name: str) -> tuple[Port, ...]:
        """What reads the block's input; `name` is the block's own below the model."""
        return ports(name, "gate_proj", "up_proj")

    def junctions(self, name: str) -> list[Junction]:
        """From up to down; the gate goes through SiLU first."""
        inside = f"{name}.intermediate", self.up_proj.out_features
        return [Junction(*inside, ports(name, "up_proj"), ports(name, "down_proj"), gates=ports(name, "gate_proj"))]

    def units(self, name: str, size: Size = "intermediate_size") -> list[Units]:
        """The channels of that junction; `size` counts them."""
        own, readers = rows(self, name, "up_proj", "gate_proj"), (Place(f"{name}.down_proj.weight", 1),)
        return [Units(f"{name}.intermediate", "channels", size, self.up_proj.out_features, own, readers)]
