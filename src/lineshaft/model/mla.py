"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), and the indexer of DeepSeek-V3.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineshaft.model.attend import Attend, IndexQuery, LatentQuery
from lineshaft.model.config import Indexer, LatentAttention, ModelConfig
from lineshaft.model.fused import added, side_by_side
from lineshaft.model.junction import Junction, Port, ports
from lineshaft.model.linear import Linear
from lineshaft.model.norm import LayerNorm, RmsNorm
from lineshaft.model.positions import Yarn
from lineshaft.model.rope import Rotation
from lineshaft.model.scorer import Scorer
from lineshaft.model.units import Place, Units, rows
from lineshaft.ops import table as ops
from lineshaft.ops.reach import Reach

# DeepSeek's published code leaves the norms inside attention at this, whatever the model's rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MlaBlock(nn.Module):
    """Queries, one latent and one shared rotated key for each token; keys and values are made from the latent."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig, attention: LatentAttention, reach: Reach) -> None:
        super().__init__()
        a, hidden = attention, config.hidden_size
        self.nope, self.rope, self.latent, self.interleaved = a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank, a.rope_interleave
        stretch = config.rope_scaling.score_scale if isinstance(config.rope_scaling, Yarn) else 1.0
        self.scale, self.reach = (self.nope + self.rope) ** -0.5 * stretch, reach
        self.heads = a.num_attention_heads
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
        self.indexer = IndexerBlock(config, a, a.indexer) if a.indexer is not None else None

    def forward(self, layer: int, x_TI: Tensor, rotate: Rotation, attend: Attend, onto_TI: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], added to `onto_TI`."""
        rotate = replace(rotate, interleaved=self.interleaved)
        first = self.q_a_proj if self.compressed_query else self.q_proj
        q_TQ, latent_TC = side_by_side(x_TI, first, self.kv_a_proj_with_mqa)
        narrow_TI = x_TI
        if self.compressed_query:
            narrow_TI = self.q_a_layernorm(q_TQ)
            q_TQ = self.q_b_proj(narrow_TI)
        q_nope, q_rope = q_TQ.view(len(x_TI), -1, self.nope + self.rope).split_with_sizes([self.nope, self.rope], -1)
        latent_TC, k_rope_TR = latent_TC.split_with_sizes([self.latent, self.rope], -1)
        query = LatentQuery(q_nope, rotate(q_rope), self.kv_b_proj)
        latent_TC, k_rope_TR = self.kv_a_layernorm(latent_TC), rotate(k_rope_TR[:, None])[:, 0]
        index = None if self.indexer is None else self.indexer(x_TI, narrow_TI, rotate)
        out_THV = attend.mla(layer, query, latent_TC, k_rope_TR, self.scale, self.reach, index)
        return added(onto_TI, self.o_proj, out_THV.flatten(1))

    def readers(self, name: str) -> tuple[Port, ...]:
        """What reads the block's input; `name` is the block's own below the model."""
        found = ports(name, "q_a_proj" if self.compressed_query else "q_proj", "kv_a_proj_with_mqa")
        return found if self.indexer is None else found + ports(f"{name}.indexer", "wk", "weights_proj")

    def junctions(self, name: str) -> list[Junction]:
        """From the norms of query and latent to what expands them, and from the value rows of kv_b to o."""
        found = []
        if self.compressed_query:
            queries = ports(name, "q_b_proj") + (ports(f"{name}.indexer", "wq_b") if self.indexer is not None else ())
            found.append(Junction(f"{name}.q_a_layernorm", self.q_b_proj.in_features, ports(name, "q_a_layernorm"), queries))
        found.append(Junction(f"{name}.kv_a_layernorm", self.latent, ports(name, "kv_a_layernorm"), ports(name, "kv_b_proj")))
        values = self.o_proj.in_features
        value_HV = torch.arange(values).view(self.heads, -1)
        written_R = F.pad(value_HV, (self.nope, 0), value=-1).flatten()  # each head's key rows stand before its value rows
        found.append(Junction(f"{name}.values", values, (Port(f"{name}.kv_b_proj", written_R),), ports(name, "o_proj")))
        return found

    def units(self, name: str) -> list[Units]:
        """Heads: what expands the query and the latent for each. The latent, its rotated key and an indexer belong to all of them."""
        own = rows(self, name, "q_b_proj" if self.compressed_query else "q_proj", "kv_b_proj")
        return [Units(f"{name}.heads", "heads", "num_attention_heads", self.heads, own, (Place(f"{name}.o_proj.weight", 1),))]


class IndexerBlock(nn.Module):
    """The lightning indexer: small heads that score earlier tokens; the best are attended to (DeepSeek-V3.2, section 2.1).

    DeepSeek's kernels score in FP8 after a Hadamard rotation; both leave the products what they are but for rounding.
    """

    __call__: Callable[..., IndexQuery]

    def __init__(self, config: ModelConfig, attention: LatentAttention, indexer: Indexer) -> None:
        super().__init__()
        assert attention.q_lora_rank is not None  # LatentAttention sees to it
        self.heads, self.width, self.top_k = indexer.num_heads, indexer.head_dim, indexer.top_k
        self.rope = attention.qk_rope_head_dim
        self.wq_b = Linear(attention.q_lora_rank, self.heads * self.width)
        self.wk = Linear(config.hidden_size, self.width)
        self.k_norm = LayerNorm(self.width, LATENT_NORM_EPS)
        self.weights_proj = HeadWeights(config.hidden_size, self.heads)

    @torch.no_grad()
    def forward(self, x_TI: Tensor, narrow_TI: Tensor, rotate: Rotation) -> IndexQuery:
        """Index queries, keys and weights of a row. The choice has no gradient, so the indexer learns nothing here."""
        q_TJD = self.wq_b(narrow_TI).view(len(x_TI), self.heads, self.width)
        key_T1D = self.k_norm(self.wk(x_TI))[:, None]
        halves = replace(rotate, interleaved=False)  # unlike the attention beside it
        return IndexQuery(self._turned(q_TJD, halves), self.weights_proj(x_TI), self._turned(key_T1D, halves)[:, 0], self.top_k)

    def _turned(self, x_THD: Tensor, rotate: Rotation) -> Tensor:
        return ops.join(rotate(x_THD[..., : self.rope]), x_THD[..., self.rope :])


class HeadWeights(Scorer):
    """How much each index head counts for a token; always in float32, and never compressed, since a choice hangs on it."""

    __call__: Callable[..., Tensor]

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, hidden] to float32 [T, heads]."""
        if self.packed is not None:
            return ops.packed_linear(ops.widen(x_TI), self.packed[1], self.packed[0], None, False)
        with torch.autocast(x_TI.device.type, enabled=False):
            weight_TJ: Tensor = ops.linear(x_TI.float(), self.weight.float(), None) * self.factor
        return weight_TJ

    @property
    def factor(self) -> float:
        """Of every weight, so that scores do not grow with the number of heads."""
        return float(self.weight.shape[0] ** -0.5)

    def packable(self) -> Tensor:
        """The factor in it."""
        return super().packable() * self.factor
