"""What a model costs, worked out from its description alone: weights, cache bytes, operations. Free of torch.

A test compares every count with the tensors of a real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.model.config import GroupedQueryAttention, ModelConfig


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
    """Multiply-adds times two of one token's forward pass, without the part that grows with the context."""
    attention_flops_per_token_and_key: int
    """What each further token of context adds for one token: plain form, scores and values."""


def cost_of(config: ModelConfig) -> Cost:
    """Count it."""
    total = active = config.hidden_size  # the final norm
    for layer in range(config.num_hidden_layers):
        attention, (block, block_active) = _attention(config), _feed_forward(config, layer)
        norms = 2 * config.hidden_size
        total += attention + block + norms
        active += attention + block_active + norms
    table = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else table
    products = active + table  # a tied table is still multiplied by
    return Cost(
        parameters=total + table + head,
        active_parameters=active + table + config.hidden_size * (not config.tie_word_embeddings),
        kv_numbers_per_token=config.num_hidden_layers * kv_width(config),
        flops_per_token=2 * products,
        attention_flops_per_token_and_key=2 * config.num_hidden_layers * _score_width(config),
    )


def kv_width(config: ModelConfig) -> int:
    """Numbers that one token leaves in the cache of one layer."""
    a = config.attention
    return 2 * a.num_key_value_heads * a.head_dim if isinstance(a, GroupedQueryAttention) else a.kv_lora_rank + a.qk_rope_head_dim


def _attention(config: ModelConfig) -> int:
    a, hidden = config.attention, config.hidden_size
    if isinstance(a, GroupedQueryAttention):
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        biases = (q + 2 * kv) * a.qkv_bias + hidden * a.output_bias
        return hidden * (q + 2 * kv) + q * hidden + biases + 2 * a.head_dim * a.qk_norm
    heads, q_width = a.num_attention_heads, a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    latent = a.kv_lora_rank + a.qk_rope_head_dim
    query = hidden * q_width if a.q_lora_rank is None else hidden * a.q_lora_rank + a.q_lora_rank * (1 + a.bias) + a.q_lora_rank * q_width
    down = hidden * latent + latent * a.bias + a.kv_lora_rank
    up = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + down + up + heads * a.v_head_dim * hidden + hidden * a.bias


def _feed_forward(config: ModelConfig, layer: int) -> tuple[int, int]:
    """(all weights, weights one token uses) of a layer's feed-forward block."""
    if not config.is_moe_layer(layer):
        dense = _swiglu(config.hidden_size, config.intermediate_size, config.mlp_bias)
        return dense, dense
    assert config.moe is not None
    moe, hidden = config.moe, config.hidden_size
    expert = _swiglu(hidden, moe.moe_intermediate_size, False)
    shared = _swiglu(hidden, moe.moe_intermediate_size * moe.n_shared_experts, False)
    router = moe.n_routed_experts * hidden + moe.n_routed_experts
    return moe.n_routed_experts * expert + shared + router, moe.num_experts_per_tok * expert + shared + router


def _swiglu(hidden: int, width: int, bias: bool) -> int:
    return 3 * hidden * width + (2 * width + hidden) * bias


def _score_width(config: ModelConfig) -> int:
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return 2 * a.num_attention_heads * a.head_dim
    return a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
