"""Grouped-query attention (Ainslie et al. 2023), as Llama, Mistral and Qwen use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineshaft.model.attend import Attend
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.fused import added, side_by_side
from lineshaft.model.junction import Junction, Port, ports
from lineshaft.model.linear import Linear
from lineshaft.model.norm import RmsNorm
from lineshaft.model.rope import Rotation
from lineshaft.model.units import Place, Units, rows
from lineshaft.ops.reach import Reach


class GqaBlock(nn.Module):
    """Projections around whatever `Attend` is handed in."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig, attention: GroupedQueryAttention, reach: Reach) -> None:
        super().__init__()
        a, hidden = attention, config.hidden_size
        self.head_dim, self.scale, self.reach = a.head_dim, a.head_dim**-0.5, reach
        self.q_proj = Linear(hidden, a.num_attention_heads * a.head_dim, a.qkv_bias)
        self.k_proj = Linear(hidden, a.num_key_value_heads * a.head_dim, a.qkv_bias)
        self.v_proj = Linear(hidden, a.num_key_value_heads * a.head_dim, a.qkv_bias)
        self.o_proj = Linear(a.num_attention_heads * a.head_dim, hidden, a.output_bias)
        self.q_norm = RmsNorm(a.head_dim, config.rms_norm_eps) if a.qk_norm else None
        self.k_norm = RmsNorm(a.head_dim, config.rms_norm_eps) if a.qk_norm else None

    def forward(self, layer: int, x_TI: Tensor, rotate: Rotation, attend: Attend, onto_TI: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], added to `onto_TI`."""
        tokens = len(x_TI)
        q, k, v = (x_TO.view(tokens, -1, self.head_dim) for x_TO in side_by_side(x_TI, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out_THD = attend.gqa(layer, rotate(q), rotate(k), v, self.scale, self.reach)
        return added(onto_TI, self.o_proj, out_THD.flatten(1))

    def readers(self, name: str) -> tuple[Port, ...]:
        """What reads the block's input; `name` is the block's own below the model."""
        return ports(name, "q_proj", "k_proj", "v_proj")

    def junctions(self, name: str) -> list[Junction]:
        """From v to o, where each query head of a group reads the same value channels."""
        channels, group = self.v_proj.out_features, self.o_proj.in_features // self.v_proj.out_features
        read_R = torch.arange(channels).view(-1, self.head_dim).repeat_interleave(group, 0).flatten()
        return [Junction(f"{name}.values", channels, ports(name, "v_proj"), (Port(f"{name}.o_proj", read_R),))]

    def units(self, name: str) -> list[Units]:
        """Key-value heads, each with the query heads that share it: these lie side by side."""
        heads, own = self.k_proj.out_features // self.head_dim, rows(self, name, "q_proj", "k_proj", "v_proj")
        return [Units(f"{name}.heads", "heads", "num_key_value_heads", heads, own, (Place(f"{name}.o_proj.weight", 1),))]
