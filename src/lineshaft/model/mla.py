"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lineshaft.model.attend import Attend, LatentQuery, Reach
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.linear import Linear
from lineshaft.model.norm import RmsNorm
from lineshaft.model.rope import Rotation

# DeepSeek's published code leaves the norms inside attention at this, whatever the model's rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MlaBlock(nn.Module):
    """Queries, one latent and one shared rotated key for each token; keys and values are made from the latent."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig, attention: LatentAttention) -> None:
        super().__init__()
        a, hidden = attention, config.hidden_size
        self.nope, self.rope, self.latent = a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank
        self.reach = Reach((self.nope + self.rope) ** -0.5)
        queries = a.num_attention_heads * (self.nope + self.rope)
        if a.q_lora_rank is None:
            self.q_proj = Linear(hidden, queries)
        else:
            self.q_a_proj = Linear(hidden, a.q_lora_rank, a.bias)
            self.q_a_layernorm = RmsNorm(a.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(a.q_lora_rank, queries)
        self.compressed_query = a.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden, a.kv_lora_rank + self.rope, a.bias)
        self.kv_a_layernorm = RmsNorm(a.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(a.kv_lora_rank, a.num_attention_heads * (self.nope + a.v_head_dim))
        self.o_proj = Linear(a.num_attention_heads * a.v_head_dim, hidden, a.bias)

    def forward(self, layer: int, x_TI: Tensor, rotate: Rotation, attend: Attend) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        q_THD = self._queries(x_TI).view(len(x_TI), -1, self.nope + self.rope)
        q_nope, q_rope = q_THD.split_with_sizes([self.nope, self.rope], -1)
        latent_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TI).split_with_sizes([self.latent, self.rope], -1)
        query = LatentQuery(q_nope, rotate(q_rope), self.kv_b_proj)
        out_THV = attend.mla(layer, query, self.kv_a_layernorm(latent_TC), rotate(k_rope_TR[:, None])[:, 0], self.reach)
        return self.o_proj(out_THV.flatten(1))

    def _queries(self, x_TI: Tensor) -> Tensor:
        if not self.compressed_query:
            return self.q_proj(x_TI)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TI)))
