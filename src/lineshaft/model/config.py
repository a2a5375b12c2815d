"""What a model is made of: one description for all families, free of torch.

Field names follow Hugging Face's config.json where they mean the same, so that a reader of one knows the other.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.model.positions import RopeScaling
from lineshaft.ops.reach import Causal, Reach

Family = Literal["deepseek_v2", "deepseek_v3", "deepseek_v32", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]


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

    @model_validator(mode="after")
    def _consistent(self) -> GroupedQueryAttention:
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"{heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even")
        return self


class Indexer(Config):
    """Picks the tokens that are attended to, by small heads of its own (DeepSeek-V3.2, section 2.1, "lightning indexer")."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    """Earlier tokens that a token sees at most."""


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
    rope_interleave: bool = True
    """Rotated pairs are neighbours, as DeepSeek trains them, instead of half a head apart."""
    indexer: Indexer | None = None
    """Attend to chosen tokens only (DeepSeek-V3.2)."""

    @model_validator(mode="after")
    def _consistent(self) -> LatentAttention:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even")
        if self.indexer is not None and self.q_lora_rank is None:
            raise ValueError("an indexer works on compressed queries: set q_lora_rank")
        if self.indexer is not None and self.indexer.head_dim < self.qk_rope_head_dim:
            raise ValueError(f"indexer.head_dim {self.indexer.head_dim} has no room for the {self.qk_rope_head_dim} rotated channels")
        return self


class MixtureOfExperts(Config):
    """Experts chosen by a router: DeepSeek-V3's by default (arXiv 2412.19437, sections 2.1.2 and 2.2)."""

    n_routed_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token to an expert. Sigmoid routers have a balancing bias that steers the choice (e_score_correction_bias)."""
    n_shared_experts: int = Field(1, ge=0)
    """Experts that every token uses, as one block of n times the width."""
    shared_expert_intermediate_size: int = Field(0, ge=0)
    """Width of one more shared expert whose output is scaled by a sigmoid gate of its own (Qwen2-MoE); 0: none."""
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    """Experts are taken from the best topk_group of n_group groups."""
    norm_topk_prob: bool = True
    """Scale the chosen weights to sum to one."""
    routed_scaling_factor: PositiveFloat = 1.0
    first_k_dense_replace: int = Field(0, ge=0)
    """That many first layers keep a dense feed-forward block."""
    mlp_only_layers: list[int] = []
    """Numbers of further layers that keep one."""
    n_added_experts: int = Field(0, ge=0)
    """Experts added to a finished model: every token uses them, scaled by a linear gate that starts at zero."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureOfExperts:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        sigmoid = self.scoring_func == "sigmoid"
        if sigmoid and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
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
    reach: list[Reach] = Field([Causal()], min_length=1)
    """Which earlier tokens a token sees, layer by layer; the list is repeated over the layers."""
    moe: MixtureOfExperts | None = None
    num_nextn_predict_layers: int = Field(0, ge=0)
    """Multi-token-prediction layers after the last one: each predicts one token further ahead (DeepSeek-V3, section 2.2)."""
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: Annotated[RopeScaling, Field(discriminator="rope_type")] | None = None
    """How positions beyond the trained context are turned."""
    rms_norm_eps: PositiveFloat = 1e-6
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    """Use the embedding table as the output projection."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of fresh weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        a, latent = self.attention, self.family.startswith("deepseek")
        if latent != isinstance(a, LatentAttention):
            raise ValueError(f"family {self.family} does not have {a.kind} attention")
        experts = latent or self.family.endswith(("_moe", "mixtral"))
        if experts != (self.moe is not None):
            raise ValueError(f"family {self.family} {'needs experts: set moe' if experts else 'has no experts: leave moe out'}")
        if len(self.reach) > self.num_hidden_layers:
            raise ValueError(f"reach names {len(self.reach)} layers of {self.num_hidden_layers}")
        outside = [layer for layer in (self.moe.mlp_only_layers if self.moe else []) if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ValueError(f"mlp_only_layers names layers that do not exist: {outside}")
        if self.num_nextn_predict_layers and not latent:
            raise ValueError(f"family {self.family} has no layers for num_nextn_predict_layers")
        return self

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.attention.head_dim if isinstance(self.attention, GroupedQueryAttention) else self.attention.qk_rope_head_dim

    @property
    def all_layers(self) -> int:
        """Layers with those for multi-token prediction."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def reach_of(self, layer: int) -> Reach:
        """What the tokens of a layer see. Prediction layers see as the first of the list does."""
        return self.reach[layer % len(self.reach) if layer < self.num_hidden_layers else 0]

    def is_moe_layer(self, layer: int) -> bool:
        """Does this layer choose among experts? Prediction layers do whenever the model has experts."""
        if self.moe is None or layer >= self.num_hidden_layers:
            return self.moe is not None
        return layer >= self.moe.first_k_dense_replace and layer not in self.moe.mlp_only_layers


class ModelConfig(Architecture):
    """A decoder-only language model with its vocabulary."""

    vocab_size: PositiveInt
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []
    """Any of these ends an answer."""
