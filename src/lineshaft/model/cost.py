"""What a model costs, worked out from its description alone: weights, cache bytes, operations. Free of torch.

A model is listed as its `products` (matrices that tokens are multiplied by) and the numbers beside them; every figure is a
sum over that list. A test compares each with the tensors of a real model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from lineshaft.model.config import GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.ops.entries import entry_bytes
from lineshaft.ops.reach import Causal, Reach, Window


@dataclass(frozen=True)
class Product:
    """Matrices of one shape that do the same work."""

    inputs: int
    outputs: int
    count: int = 1
    used: int = 1
    """How many of them one token uses."""
    bias: bool = False
    linear: bool = True
    """A linear layer, whose weight can be stored in another format; not so routers and gates."""

    @property
    def size(self) -> int:
        """Numbers in one of them, without bias."""
        return self.inputs * self.outputs

    def weights(self, copies: int) -> int:
        """Numbers in that many of them."""
        return copies * (self.size + self.outputs * self.bias)


@dataclass(frozen=True)
class Part:
    """A block of the model."""

    products: list[Product] = field(default_factory=list)
    vectors: int = 0
    """Numbers in norms, and in biases that stand alone."""

    def __add__(self, other: Part) -> Part:
        return Part([*self.products, *other.products], self.vectors + other.vectors)

    @property
    def parameters(self) -> int:
        """All its numbers."""
        return self.vectors + sum(item.weights(item.count) for item in self.products)

    @property
    def active(self) -> int:
        """Numbers that one token uses."""
        return self.vectors + sum(item.weights(item.used) for item in self.products)

    @property
    def flops(self) -> int:
        """Multiply-adds times two of one token's products."""
        return 2 * sum(item.used * item.size for item in self.products)


@dataclass(frozen=True)
class Cost:
    """Exact counts for one model."""

    parameters: int
    """All weights, embeddings, norms, router biases and layers for multi-token prediction included."""
    active_parameters: int
    """Weights that one token uses in plain decoding; of the embedding table one row."""
    kv_numbers_per_token: int
    """Numbers that one token of context leaves in the cache, over all layers."""
    flops_per_token: int
    """Multiply-adds times two of the matrix products of one token's forward pass, without the part that grows with the context."""


def cost_of(config: ModelConfig) -> Cost:
    """Count it."""
    table, tied = config.vocab_size * config.hidden_size, config.tie_word_embeddings
    main = Part(vectors=config.hidden_size)
    for layer in range(config.num_hidden_layers):
        main += layer_part(config, layer)
    ahead = sum(prediction_part(config, layer).parameters for layer in range(config.num_hidden_layers, config.all_layers))
    return Cost(
        parameters=main.parameters + ahead + table + (0 if tied else table),
        active_parameters=main.active + table + (0 if tied else config.hidden_size),
        kv_numbers_per_token=config.num_hidden_layers * kv_width(config),
        flops_per_token=main.flops + 2 * table,  # a tied table is multiplied by as well
    )


def products(config: ModelConfig) -> Iterator[Product]:
    """Every matrix but the embedding table: layer by layer, then the prediction layers, then an untied head."""
    for layer in range(config.num_hidden_layers):
        yield from layer_part(config, layer).products
    for layer in range(config.num_hidden_layers, config.all_layers):
        yield from prediction_part(config, layer).products
    if not config.tie_word_embeddings:
        yield Product(config.hidden_size, config.vocab_size)


def kv_entries(config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of what one token leaves in the cache of one layer: keys and values of each head; or a latent, and an indexer's key."""
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return [(a.num_key_value_heads, a.head_dim)] * 2
    return [(a.kv_lora_rank + a.qk_rope_head_dim,), *([(a.indexer.head_dim,)] if a.indexer else [])]


def kv_width(config: ModelConfig) -> int:
    """Numbers that one token leaves in the cache of one layer."""
    return sum(prod(shape) for shape in kv_entries(config))


def kv_bytes(config: ModelConfig, held: str) -> int:
    """Bytes that one token leaves in the cache of one layer, held as this dtype; int8: as codes with scales."""
    if held == "int8":
        return sum(prod(heads) * entry_bytes(width) for *heads, width in kv_entries(config))
    return kv_width(config) * {"float32": 4, "bfloat16": 2, "float16": 2}[held]


def attention_flops(config: ModelConfig, tokens: int) -> int:
    """What queries and keys cost over one document: scores, values and, where tokens are chosen, the choosing.

    Multiply-adds times two, plain form (keys and values expanded), counting only pairs of tokens that see each other. The last
    token's share is the difference to `tokens - 1`.
    """
    a = config.attention
    indexer = a.indexer if isinstance(a, LatentAttention) else None
    total = 0
    for reach, layers in _reaches(config):
        seen = reach.pairs(tokens)
        if indexer is not None:  # each of its heads scores all, and the heads are added up by weight
            total += 2 * layers * seen * indexer.num_heads * (indexer.head_dim + 1)
            seen = _chosen_pairs(reach, tokens, indexer.top_k)
        total += 2 * layers * seen * score_width(config)
    return total


def score_width(config: ModelConfig) -> int:
    """Multiply-adds of one query meeting one key: score and value, over all heads."""
    a = config.attention
    if isinstance(a, GroupedQueryAttention):
        return 2 * a.num_attention_heads * a.head_dim
    return a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)


def _reaches(config: ModelConfig) -> list[tuple[Reach, int]]:
    """Each kind of reach and the number of layers that have it."""
    counts: dict[int, int] = {}
    for layer in range(config.num_hidden_layers):
        counts[layer % len(config.reach)] = counts.get(layer % len(config.reach), 0) + 1
    return [(config.reach[place], layers) for place, layers in counts.items()]


def _chosen_pairs(reach: Reach, tokens: int, top_k: int) -> int:
    """Pairs left when each token keeps the best `top_k` of those it sees."""
    if isinstance(reach, Causal):
        return Window(window=top_k).pairs(tokens)
    return sum(min(top_k, reach.pairs(token + 1) - reach.pairs(token)) for token in range(tokens))


def layer_part(config: ModelConfig, layer: int) -> Part:
    """Attention, feed-forward block and the two norms before them."""
    return attention_part(config) + feed_forward_part(config, layer) + Part(vectors=2 * config.hidden_size)


def prediction_part(config: ModelConfig, layer: int) -> Part:
    """A multi-token-prediction layer (DeepSeek-V3, section 2.2): two norms, a product that halves, a whole layer, a norm."""
    hidden = config.hidden_size
    return Part([Product(2 * hidden, hidden)], vectors=3 * hidden) + layer_part(config, layer)


def attention_part(config: ModelConfig) -> Part:
    """The projections around attention, with their norms."""
    a, hidden = config.attention, config.hidden_size
    if isinstance(a, GroupedQueryAttention):
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        keys_values = Product(hidden, kv, count=2, used=2, bias=a.qkv_bias)
        around = [Product(hidden, q, bias=a.qkv_bias), keys_values, Product(q, hidden, bias=a.output_bias)]
        return Part(around, vectors=2 * a.head_dim * a.qk_norm)
    heads = a.num_attention_heads
    down = Product(hidden, a.kv_lora_rank + a.qk_rope_head_dim, bias=a.bias)
    up = Product(a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim))
    out = Product(heads * a.v_head_dim, hidden, bias=a.bias)
    return _query_part(hidden, a) + Part([down, up, out], vectors=a.kv_lora_rank) + _indexer_part(hidden, a)


def _query_part(hidden: int, a: LatentAttention) -> Part:
    queries = a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    if a.q_lora_rank is None:
        return Part([Product(hidden, queries)])
    return Part([Product(hidden, a.q_lora_rank, bias=a.bias), Product(a.q_lora_rank, queries)], vectors=a.q_lora_rank)


def _indexer_part(hidden: int, a: LatentAttention) -> Part:
    if a.indexer is None or a.q_lora_rank is None:
        return Part()
    heads, width = a.indexer.num_heads, a.indexer.head_dim
    projections = [Product(a.q_lora_rank, heads * width), Product(hidden, width), Product(hidden, heads, linear=False)]
    return Part(projections, vectors=2 * width)  # its key norm has a bias


def feed_forward_part(config: ModelConfig, layer: int) -> Part:
    """A layer's dense block, or its router and experts."""
    if config.moe is None or not config.is_moe_layer(layer):
        return Part(_swiglu(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))
    return _experts_part(config.hidden_size, config.moe)


def _experts_part(hidden: int, moe: MixtureOfExperts) -> Part:
    width = moe.moe_intermediate_size
    steered = moe.scoring_func == "sigmoid"
    part = Part([Product(hidden, moe.n_routed_experts, linear=False)], vectors=moe.n_routed_experts * steered)
    part += Part(_swiglu(hidden, width, moe.n_routed_experts, moe.num_experts_per_tok))
    if moe.n_shared_experts:
        part += Part(_swiglu(hidden, width * moe.n_shared_experts))
    if moe.shared_expert_intermediate_size:
        part += Part([*_swiglu(hidden, moe.shared_expert_intermediate_size), Product(hidden, 1, linear=False)])
    if moe.n_added_experts:
        gate = Product(hidden, 1, count=moe.n_added_experts, used=moe.n_added_experts, linear=False)
        part += Part([*_swiglu(hidden, width, moe.n_added_experts, moe.n_added_experts), gate])
    return part


def _swiglu(hidden: int, width: int, count: int = 1, used: int = 1, bias: bool = False) -> list[Product]:
    gate_up = Product(hidden, width, 2 * count, 2 * used, bias)
    return [gate_up, Product(width, hidden, count, used, bias)]
