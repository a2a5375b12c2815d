"""One decoder layer: attention, then a feed-forward block, each added to what came in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lineshaft.model.attend import Attend
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.ffn import FeedForward
from lineshaft.model.gqa import GqaBlock
from lineshaft.model.junction import Junction, ports
from lineshaft.model.mla import MlaBlock
from lineshaft.model.moe import ExpertBlock
from lineshaft.model.norm import RmsNorm
from lineshaft.model.rope import Rotation
from lineshaft.model.units import Units


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        a, reach = config.attention, config.reach_of(index)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GqaBlock(config, a, reach) if isinstance(a, GroupedQueryAttention) else MlaBlock(config, a, reach)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: FeedForward | ExpertBlock
        if config.moe is not None and config.is_moe_layer(index):
            self.mlp = ExpertBlock(config.hidden_size, config.moe)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x_TI: Tensor, rotate: Rotation, attend: Attend) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        x_TI = self.self_attn(self.index, self.input_layernorm(x_TI), rotate, attend, x_TI)
        return self.mlp(self.post_attention_layernorm(x_TI), x_TI)

    def junctions(self, name: str) -> list[Junction]:
        """From each norm to what reads it, and those inside attention and feed-forward; `name` is the layer's own below the model."""
        attention, feed, hidden = f"{name}.self_attn", f"{name}.mlp", len(self.input_layernorm.weight)
        return [
            Junction(f"{name}.input_layernorm", hidden, ports(name, "input_layernorm"), self.self_attn.readers(attention)),
            *self.self_attn.junctions(attention),
            Junction(f"{name}.post_attention_layernorm", hidden, ports(name, "post_attention_layernorm"), self.mlp.readers(feed)),
            *self.mlp.junctions(feed),
        ]

    def units(self, name: str) -> list[Units]:
        """What can be taken out of attention and feed-forward."""
        return [*self.self_attn.units(f"{name}.self_attn"), *self.mlp.units(f"{name}.mlp")]
