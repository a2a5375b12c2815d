"""What a model costs, worked out from its description alone: weights, cache bytes, operations. Free of torch.

A test compares every count with the tensors of a real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.model.config import GroupedQueryAttention, LatentAttention, ModelConfig


@dataclass(frozen=True)
class Cost:
    """Exact counts for one model."""

    parameters: int
    """All weights, embeddings, norms and router biases included."""
    active_parameters: int
    """Weights that one token uses; of the embedding table one row."""
    kv_numbers_per_token: int
    """Numbers that one token of context leaves in the cache, over all layers."""
    flops_per_token: int
    """Multiply-adds times two of the matrix products of one token's forward pass, without the part that grows with the context."""
    attention_flops_per_token_and_key: int
    """What each further token of context adds for one token: plain form, scores and values."""


@dataclass(frozen=True)
class _Weights:
    """Numbers in matrices, which a token is multiplied by, and in vectors: norms and biases."""

    matrices: int = 0
    vectors: int = 0

    def __add__(self, other: _Weights) -> _Weights:
        return _Weights(self.matrices + other.matrices, self.vectors + other.vectors)

    def __rmul__(self, times: int) -> _Weights:
        return _Weights(times * self.matrices, times * self.vectors)

    @property
    def total(self) -> int:
        return self.matrices + self.vectors


def cost_of(config: ModelConfig) -> Cost:
    """Count it."""
    hidden = config.hidden_size
    total = active = _norm(hidden)
    for layer in range(config.num_hidden_layers):
        block, block_active = _feed_forward(config, layer)
        around = _attention(config) + 2 * _norm(hidden)
        total += around + block
        active += around + block_active
    table = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else table
    return Cost(
        parameters=total.total + table + head,
        active_parameters=active.total + table + (0 if config.tie_word_embeddings else hidden),
        kv_numbers_per_token=config.num_hidden_layers * kv_width(config),
        flops_per_token=2 * (active.matrices + table),  # a tied table is multiplied by as well
        attention_flops_per_token_and_key=2 * config.num_hidden_layers * _score_width(config),
    )


def kv_width(config: ModelConfig) -> int:
    """Numbers that one token leaves in the cache of one layer."""
    a = config.attention
    return 2 * a.num_key_value_heads * a.head_dim if isinstance(a, GroupedQueryAttention) else a.kv_lora_rank + a.qk_rope_head_dim


def _linear(inputs: int, outputs: int, bias: bool = False) -> _Weights:
    return _Weights(inputs * outputs, outputs * bias)


def _norm(width: int) -> _Weights:
    return _Weights(0, width)


def _attention(config: ModelConfig) -> _Weights:
    a, hidden = config.attention, config.hidden_size
    if isinstance(a, GroupedQueryAttention):
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        projections = _linear(hidden, q, a.qkv_bias) + 2 * _linear(hidden, kv, a.qkv_bias) + _linear(q, hidden, a.output_bias)
        return projections + 2 * a.qk_norm * _norm(a.head_dim)
    heads, queries = a.num_attention_heads, a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    down = _linear(hidden, a.kv_lora_rank + a.qk_rope_head_dim, a.bias) + _norm(a.kv_lora_rank)
    up = _linear(a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim))
    return _query(hidden, queries, a) + down + up + _linear(heads * a.v_head_dim, hidden, a.bias)


def _query(hidden: int, queries: int, a: LatentAttention) -> _Weights:
    if a.q_lora_rank is None:
        return _linear(hidden, queries)
    return _linear(hidden, a.q_lora_rank, a.bias) + _norm(a.q_lora_rank) + _linear(a.q_lora_rank, queries)


def _feed_forward(config: ModelConfig, layer: int) -> tuple[_Weights, _Weights]:
    """(all weights, weights one token uses) of a layer's feed-forward block."""
    moe, hidden = config.moe, config.hidden_size
    if moe is None or not config.is_moe_layer(layer):
        dense = _swiglu(hidden, config.intermediate_size, config.mlp_bias)
        return dense, dense
    expert = _swiglu(hidden, moe.moe_intermediate_size)
    always = _swiglu(hidden, moe.moe_intermediate_size * moe.n_shared_experts) + _linear(hidden, moe.n_routed_experts, bias=True)
    return moe.n_routed_experts * expert + always, moe.num_experts_per_tok * expert + always


def _swiglu(hidden: int, width: int, bias: bool = False) -> _Weights:
    return 2 * _linear(hidden, width, bias) + _linear(width, hidden, bias)


def _score_width(config: ModelConfig) -> int:
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return 2 * a.num_attention_heads * a.head_dim
    return a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
