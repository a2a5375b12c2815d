"""What a model is made of: one description for all families, free of torch.

Field names follow Hugging Face's config.json where they mean the same, so that a reader of one knows the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config

Family = Literal["deepseek_v3", "llama", "mistral", "qwen2", "qwen3"]


class GroupedQueryAttention(Config):
    """Attention with fewer key-value heads than query heads (Ainslie et al. 2023)."""

    kind: Literal["gqa"] = "gqa"
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """Bias on the output projection."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    sliding_window: PositiveInt | None = None
    """A token sees itself and the sliding_window - 1 tokens before it; null: all of them."""


class LatentAttention(Config):
    """Multi-head latent attention: keys and values are made from one small cached latent (DeepSeek-V2, section 2.1)."""

    kind: Literal["mla"] = "mla"
    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None = None
    """Width of the compressed query; null: the query is projected directly."""
    kv_lora_rank: PositiveInt
    """Width of the cached latent."""
    qk_nope_head_dim: PositiveInt
    """Part of each head that does not see positions."""
    qk_rope_head_dim: PositiveInt
    """Part of each head that is rotated; its key is shared by all heads."""
    v_head_dim: PositiveInt
    bias: bool = False
    """Bias on the down-projections and the output projection."""


class MixtureOfExperts(Config):
    """Experts chosen by a sigmoid router with a balancing bias (DeepSeek-V3, sections 2.1.2 and 2.2)."""

    n_routed_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    n_shared_experts: int = Field(1, ge=0)
    """Experts that every token uses, as one block of n times the width."""
    moe_intermediate_size: PositiveInt
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    """Experts are taken from the best topk_group of n_group groups."""
    norm_topk_prob: bool = True
    """Scale the chosen weights to sum to one."""
    routed_scaling_factor: PositiveFloat = 1.0
    first_k_dense_replace: int = Field(0, ge=0)
    """That many first layers keep a dense feed-forward block."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureOfExperts:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(f"n_group {self.n_group} leaves fewer than the two experts by which a group is judged")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts in reach")
        return self


class Architecture(Config):
    """The shape of a decoder-only language model, before a vocabulary is chosen."""

    family: Family
    """Names the `model_type` and class under which other tools load the checkpoint."""
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    intermediate_size: PositiveInt
    """Width of the dense feed-forward blocks."""
    max_position_embeddings: PositiveInt
    """Most tokens of context."""
    attention: Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]
    moe: MixtureOfExperts | None = None
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    """Use the embedding table as the output projection."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of fresh weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        a = self.attention
        latent = self.family == "deepseek_v3"
        if latent != isinstance(a, LatentAttention):
            raise ValueError(f"family {self.family} does not have {a.kind} attention")
        if latent != (self.moe is not None):
            raise ValueError(f"family {self.family} {'needs experts: set moe' if latent else 'has no experts: leave moe out'}")
        if self.rotary_dim % 2:
            raise ValueError(f"{'qk_rope_head_dim' if latent else 'head_dim'} {self.rotary_dim} must be even")
        if isinstance(a, GroupedQueryAttention) and a.num_attention_heads % a.num_key_value_heads:
            heads = f"num_attention_heads {a.num_attention_heads}"
            raise ValueError(f"{heads} is not a multiple of num_key_value_heads {a.num_key_value_heads}")
        for name, wanted, has in self._traits(a):
            if has != wanted:
                raise ValueError(f"family {self.family} has {name} {wanted}, not {has}: other tools could not load the checkpoint")
        return self

    def _traits(self, a: GroupedQueryAttention | LatentAttention) -> Iterator[tuple[str, object, object]]:
        """What a family's config.json fixes: (name, the family's value, ours). Said here, before anything is trained."""
        if self.family != "llama":
            yield "mlp_bias", False, self.mlp_bias
        if isinstance(a, GroupedQueryAttention):
            free = self.family in ("llama", "qwen3")
            yield "qkv_bias", a.qkv_bias if free else self.family == "qwen2", a.qkv_bias
            yield "output_bias", a.qkv_bias if free else False, a.output_bias
            yield "qk_norm", self.family == "qwen3", a.qk_norm
            if self.family != "mistral":
                yield "sliding_window", None, a.sliding_window

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.attention.head_dim if isinstance(self.attention, GroupedQueryAttention) else self.attention.qk_rope_head_dim

    @property
    def rope_interleaved(self) -> bool:
        """Rotated pairs are neighbours (DeepSeek) instead of half a head apart."""
        return self.family == "deepseek_v3"

    def is_moe_layer(self, layer: int) -> bool:
        """Does this layer choose among experts?"""
        return self.moe is not None and layer >= self.moe.first_k_dense_replace


class ModelConfig(Architecture):
    """A decoder-only language model with its vocabulary."""

    vocab_size: PositiveInt
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []
    """Any of these ends an answer."""
