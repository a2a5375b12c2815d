"""What a pass through one layer holds where documents lie packed and nothing is cached or kept for a way back. Free of torch.

As model.attend.PackedCausal attends: calibration and scoring. Serving's pass is `memory.one_pass`, training's `memory.Kept`. In
bfloat16 the widened operands of ops/cpu.py are counted, also where the processor needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.model.config import GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import Product, feed_forward_part
from lineshaft.model.memory import ITEM, SCORED, Stored


@dataclass(frozen=True)
class PackedPass:
    """So many tokens, in rows of so many, go through a layer at once."""

    config: ModelConfig
    stored: Stored
    tokens: int
    row: int

    def layer(self, index: int) -> int:
        """Most bytes held at once beside what came in, the result among them. Experts are taken to be loaded alike."""
        came = self._item * self.tokens * self.config.hidden_size
        # Attention reads what came in, normed; the block after it stands beside the sum of both.
        return came + max(self._attention(), came + self._feed_forward(index))

    @property
    def _item(self) -> int:
        return ITEM[self.stored.dtype]

    @property
    def _widened(self) -> bool:
        return self.stored.dtype == "bfloat16" and self.stored.format == "dense"

    def _product(self, product: Product, tokens: int) -> int:
        """Weight and rows made ready, and the result. Its sums are in float32 where the processor has no products in bfloat16."""
        made, outputs = self.stored.working(product, self.stored.dtype, tokens), tokens * product.outputs
        if self._widened:
            return made + 4 * (tokens * product.inputs + outputs)
        if self.stored.dtype == "bfloat16":
            made = max(made, self._item * product.inputs * product.outputs + 4 * outputs)
        return made + self._item * outputs

    def _attention(self) -> int:
        a = self.config.attention
        mask = (4 if self.stored.dtype == "bfloat16" else self._item) * self.tokens * self.row
        return mask + (self._gqa(a) if isinstance(a, GroupedQueryAttention) else self._mla(a))

    def _gqa(self, a: GroupedQueryAttention) -> int:
        """Projected and rotated queries and keys, and values; then the result."""
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        return max(self._item * (2 * q + 3 * kv) * self.tokens + self._attended(q + 2 * kv, q), self._given_out(q + 2 * kv, q))

    def _mla(self, a: LatentAttention) -> int:
        """Queries, the latent and what it is expanded to, keys and queries put together; then the result, as wide as keys."""
        heads, width = a.num_attention_heads, a.qk_nope_head_dim + a.qk_rope_head_dim
        expanded = heads * (a.qk_nope_head_dim + a.v_head_dim)
        latent = (a.q_lora_rank or 0) + a.kv_lora_rank + (1 + heads) * a.qk_rope_head_dim
        index = 0
        if a.indexer is not None:
            index = self.tokens * self._item * (2 * a.indexer.num_heads + 1) * a.indexer.head_dim
            index += 2 * 4 * SCORED * a.indexer.num_heads * self.row
        filled = heads * width if a.v_head_dim < width else 0
        kept = self._item * (3 * heads * width + latent + expanded) * self.tokens
        attended = index + kept + self._attended(2 * heads * width + heads * a.v_head_dim, heads * width + filled)
        return max(attended, self._given_out(heads * width + latent, heads * a.v_head_dim))

    def _given_out(self, kept: int, width: int) -> int:
        """Beside the result of attention so many numbers of a token, what it is projected to, and its sum with what came in."""
        product = self._product(Product(width, self.config.hidden_size), self.tokens)
        return self._item * (kept + width) * self.tokens + max(product, 2 * self._item * self.config.hidden_size * self.tokens)

    def _attended(self, into: int, out: int) -> int:
        """Numbers of a token that go into attention, widened, and that come out."""
        return 4 * self.tokens * (into + out) if self.stored.dtype == "bfloat16" else self._item * self.tokens * out

    def _feed_forward(self, index: int) -> int:
        moe = self.config.moe
        if moe is None or not self.config.is_moe_layer(index):
            return self._swiglu(self.config.intermediate_size, self.tokens)
        return self._experts(moe)

    def _swiglu(self, width: int, tokens: int) -> int:
        """Gate, up, SiLU and their product; or gate, and up while it is worked out."""
        up = self._item * tokens * width + self._product(Product(self.config.hidden_size, width), tokens)
        return max(4 * self._item * tokens * width, up)

    def _experts(self, moe: MixtureOfExperts) -> int:
        hidden, pairs = self.config.hidden_size, self.tokens * moe.num_experts_per_tok
        run = -(-pairs // moe.n_routed_experts)
        one_expert = 3 * self._item * pairs * hidden + self._swiglu(moe.moe_intermediate_size, run)
        # In the order of tokens and of experts, back again, weighted, and added up.
        gathered = self._item * (5 * pairs + self.tokens) * hidden
        shared = max(moe.moe_intermediate_size * moe.n_shared_experts, moe.shared_expert_intermediate_size)
        beside = self._item * self.tokens * hidden + self._swiglu(shared, self.tokens)
        return max(one_expert, gathered, beside)


def readings(config: ModelConfig, index: int) -> list[Product]:
    """One product for each different input that linear layers of this layer are given; `count` and `used`: how many such inputs there are.

    Query, key and value share one, and so do gate and up; an expert's are its own.
    """
    a, feed = config.attention, [item for item in feed_forward_part(config, index).products if item.linear]
    found = _attention_readings(config, a)
    for gate_up, down in zip(feed[::2], feed[1::2], strict=True):
        found += [Product(gate_up.inputs, gate_up.outputs, gate_up.count // 2, gate_up.used // 2), down]
    return found


def _attention_readings(config: ModelConfig, a: GroupedQueryAttention | LatentAttention) -> list[Product]:
    hidden = config.hidden_size
    if isinstance(a, GroupedQueryAttention):
        return [Product(hidden, a.num_attention_heads * a.head_dim), Product(a.num_attention_heads * a.head_dim, hidden)]
    expanded = a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
    found = [Product(hidden, a.kv_lora_rank), Product(a.kv_lora_rank, expanded), Product(a.num_attention_heads * a.v_head_dim, hidden)]
    if a.q_lora_rank is not None:
        found.append(Product(a.q_lora_rank, a.num_attention_heads * a.qk_nope_head_dim))
    if a.indexer is not None:  # its key reads the layer's input when others were read in between
        found.append(Product(hidden, a.indexer.head_dim))
    return found
