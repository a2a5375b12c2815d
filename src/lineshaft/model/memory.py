"""What a task holds in memory at once, worked out from the model's description alone. Free of torch.

A task goes through phases; each holds terms of so many bytes at the same moment, and the largest phase is the peak. This
file knows the model: how its weights are stored, what one pass makes, what training keeps for the way back. The tasks'
own files (engine/memory, train/memory, compress/memory) put these together as their code does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model.config import GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import Product, cost_of, feed_forward_part, layer_part, products
from lineshaft.model.folder import read_json
from lineshaft.ops.reach import Window

Terms = Mapping[str, int]
"""What to how many bytes."""

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
Packing = Literal["whole", "mask", "alone"]
ALONE = 128
"""model.attend.ALONE; a test holds them equal. This file is free of torch and can't import it."""
SCORED = 64
"""model.attend.SCORED: queries for which an indexer chooses at a time."""
_SHAPE = 16
"""Bytes of weight_shape. One layout of integers (int-quantized) has none; that is let pass."""
_PART = 1024
"""reference.EXACT_INPUTS; a test holds them equal."""
_NORM_SUM = 4  # a norm keeps one float32 a row


@dataclass(frozen=True)
class Memory:
    """What a task needs, phase by phase, without what the process needs for itself."""

    phases: Mapping[str, Terms]

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.needs)

    @property
    def total(self) -> int:
        """Bytes in that phase."""
        return self.needs(self.peak)

    def needs(self, phase: str) -> int:
        """Bytes held in one phase."""
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class Stored:
    """How the weights of a model are held: dense ones as `dtype`, those of linear layers perhaps in fewer bits."""

    dtype: str = "float32"
    format: str = "dense"
    """dense, fp8 (one scale a block of 128 x 128), or integers: see `is_format`."""
    skips_head: bool = True
    """An untied head stays dense whatever the format."""
    in_files: int | None = None
    """Bytes of the files that hold them, where there are files already."""

    def cast(self, dtype: str) -> Stored:
        """The same with dense weights in another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, in_files=None)

    def describe(self) -> str:
        """For people."""
        return self.dtype if self.format == "dense" else f"{self.format}, the rest {self.dtype}"

    def total(self, config: ModelConfig) -> int:
        """Bytes of all weights."""
        if self.in_files is not None:
            return self.in_files
        dense = cost_of(config).parameters * ITEM[self.dtype]
        return dense - sum(item.count * (item.size * ITEM[self.dtype] - self.one(item)) for item in self._coded(config))

    def one(self, product: Product) -> int:
        """Bytes of one matrix in this format, without its bias."""
        if self.format == "dense" or not product.linear:
            return product.size * ITEM[self.dtype]
        if self.format == "fp8":
            return product.size + 4 * -(-product.outputs // 128) * -(-product.inputs // 128)
        bits, group, zeros, _ = integer_of(self.format)
        groups = -(-product.inputs // (group or product.inputs))
        zero_points = 4 * -(-product.outputs // 8) * groups if zeros else 0
        return product.outputs * -(-product.inputs * bits // 8) + 2 * product.outputs * groups + zero_points + _SHAPE

    def unpacked(self, product: Product, dtype: str) -> int:
        """Most bytes held while one matrix is made ready for a product in `dtype`: decoded (integers.Integers.decode,
        fp8.unpack_fp8), or widened from bfloat16 (ops/cpu.py; counted also where the processor needs no widening)."""
        if self.format == "dense" or not product.linear:
            return 4 * product.size if dtype == "bfloat16" else 0
        if self.format == "fp8":
            return product.size * (8 if dtype == "float32" else 10)
        return self._codes(product) + product.size * (4 if dtype == "float32" else 6)

    def working(self, product: Product, dtype: str, tokens: int) -> int:
        """Most bytes held during the product of so many rows, without rows and results: `unpacked`, or what rounded rows take
        (reference.linear_int_a8)."""
        if not self.format.endswith("-a8") or not product.linear:
            return self.unpacked(product, dtype)
        _, group, _, _ = integer_of(self.format)
        part = 4 * product.outputs * min(group or product.inputs, _PART) + 20 * tokens * product.outputs
        rows = 4 * tokens * product.inputs
        return self._codes(product) + max(product.size, rows + max(rows, part))

    def _codes(self, product: Product) -> int:
        """Bytes of an integer weight's codes, scales and zeros while it is used. 8-bit codes are looked at where they lie."""
        bits, group, _, _ = integer_of(self.format)
        return 9 * product.outputs * (product.inputs // (group or product.inputs)) + (product.size if bits == 4 else 0)

    def _coded(self, config: ModelConfig) -> list[Product]:
        coded = [item for item in products(config) if item.linear] if self.format != "dense" else []
        return coded[:-1] if coded and self.skips_head and not config.tie_word_embeddings else coded


def stored_in(folder: Path) -> Stored:
    """How the weights in a checkpoint folder are stored, as its config.json says; a folder without weights will do."""
    hf = read_json(folder, "config.json")
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) if files else None
    dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    if dtype not in ITEM:
        raise BadCheckpoint(f"{folder}: config.json says dtype {dtype!r}, supported: {', '.join(ITEM)}")
    return Stored(dtype, _format_of(hf.get("quantization_config")), in_files=size)


_INTEGER = re.compile(r"int(?P<bits>[84])(?:-(?P<group>[1-9][0-9]*))?(?P<zeros>-zeros)?(?P<rounded>-a8)?")


def is_format(name: str) -> bool:
    """Does Stored know this format? dense, fp8, int8 or int4 with one scale a channel, or with -N one a group of N inputs; then
    -zeros (int4: with zero points) and -a8 (activations rounded to 8 bits a token), where they apply."""
    return name in ("dense", "fp8") or (_INTEGER.fullmatch(name) is not None and not name.startswith("int8") & ("-zeros" in name))


def integer_of(name: str) -> tuple[Literal[8, 4], int | None, bool, bool]:
    """Bits, inputs that share a scale (None: all), zero points, activations rounded? Of names of integers that `is_format` knows."""
    found = _INTEGER.fullmatch(name)
    assert found is not None  # is_format sees to it
    size, zeros, rounded = found["group"], found["zeros"] is not None, found["rounded"] is not None
    return 8 if found["bits"] == "8" else 4, int(size) if size else None, zeros, rounded


def _format_of(quantization: Any) -> str:
    """The format that a quantization_config names; whether it is one that we run is found out when it is loaded."""
    if not isinstance(quantization, dict):
        return "dense"
    if quantization.get("quant_method") == "fp8":
        return "fp8"
    groups = quantization.get("config_groups")
    named = [_integer_name(group) for group in groups.values()] if isinstance(groups, dict) else []
    # Of several the one that takes most while it is used: 4 bits are unpacked first. Their bytes are those of the files.
    return min(named, key=lambda name: (not name.startswith("int4"), name.endswith("-a8")), default="int8")


def _integer_name(group: Any) -> str:
    group = group if isinstance(group, dict) else {}
    weights: Any = group["weights"] if isinstance(group.get("weights"), dict) else {}
    four, size = weights.get("num_bits") == 4, weights.get("group_size")
    width = f"-{size}" if isinstance(size, int) and size > 0 else ""
    zeros = "-zeros" if four and weights.get("symmetric") is False else ""
    return f"int{4 if four else 8}{width}{zeros}{'-a8' if group.get('input_activations') else ''}"


def one_pass(config: ModelConfig, stored: Stored, dtype: str, tokens: int, context: int) -> int:
    """Most bytes that a forward pass over `tokens` packed tokens holds at once, logits left out; nothing is kept for a way back.

    `context`: tokens of the longest request, whose cached entries are read. Experts are taken to be loaded alike.
    """
    residual = 2 * tokens * config.hidden_size * ITEM[dtype]  # what came into the layer, and with attention added
    attention = _attention_pass(config, stored, dtype, tokens, context)
    blocks = [_feed_forward_pass(config, layer, stored, dtype, tokens) for layer in range(config.num_hidden_layers)]
    return residual + max(attention, *blocks)


def _attention_pass(config: ModelConfig, stored: Stored, dtype: str, tokens: int, context: int) -> int:
    a, item = config.attention, ITEM[dtype]
    normed = config.hidden_size
    if isinstance(a, GroupedQueryAttention):
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        # projected and rotated queries and keys, values; results by tile, request and step; one request's keys and values gathered
        return item * (tokens * (normed + 5 * q + 3 * kv) + 2 * context * kv)
    heads, entry = a.num_attention_heads, a.kv_lora_rank + a.qk_rope_head_dim
    projected = 2 * heads * (a.qk_nope_head_dim + a.qk_rope_head_dim) + 2 * entry
    # Against latents: queries alone, beside rotated ones, and in the order of a tile; results by tile, request and step.
    absorbed = heads * (2 * a.kv_lora_rank + 4 * entry)
    up = Product(a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim))
    return item * (tokens * (normed + projected + absorbed) + context * entry) + stored.unpacked(up, dtype)


def _feed_forward_pass(config: ModelConfig, layer: int, stored: Stored, dtype: str, tokens: int) -> int:
    hidden, item, moe = config.hidden_size, ITEM[dtype], config.moe

    def largest(rows: int) -> int:
        return max(stored.working(product, dtype, rows) for product in feed_forward_part(config, layer).products)

    if moe is None or not config.is_moe_layer(layer):
        return item * tokens * hidden + _swiglu_pass(config.intermediate_size, tokens, item, largest(tokens))
    pairs = tokens * moe.num_experts_per_tok
    run = -(-pairs // moe.n_routed_experts)
    one_expert = item * 3 * pairs * hidden + _swiglu_pass(moe.moe_intermediate_size, run, item, largest(run))
    gathered = item * 5 * pairs * hidden  # in the order of tokens and of experts, back again, and weighted
    shared = max(moe.moe_intermediate_size * moe.n_shared_experts, moe.shared_expert_intermediate_size)
    beside = item * tokens * hidden + _swiglu_pass(shared, tokens, item, largest(tokens))
    return item * tokens * hidden + max(one_expert, gathered, beside)


def _swiglu_pass(width: int, tokens: int, item: int, unpacking: int) -> int:
    """Gate, up, SiLU and product at once; or gate and up with a weight being unpacked."""
    return max(4 * item * tokens * width, 2 * item * tokens * width + unpacking)


@dataclass(frozen=True)
class Kept:
    """What training keeps of a batch for the way back, in bytes: what autograd saves, counted tensor by tensor.

    Products are in float32, or in bfloat16 by autocast: then norms and residuals stay float32, and each product keeps its
    own bfloat16 copies of input and weight.
    """

    config: ModelConfig
    tokens: int
    row: int
    bfloat16: bool = False
    packing: Packing = "mask"
    """How model.attend.PackedCausal goes about the documents of a batch: rows of one document each as wholes, short documents
    together under a mask of row x row numbers, long ones alone."""

    def layer(self, index: int) -> int:
        """Of one layer, its weights' copies included."""
        a = self.config.attention
        attention = self._gqa(a) if isinstance(a, GroupedQueryAttention) else self._mla(a)
        copies = self._copies([item for item in layer_part(self.config, index).products if item.linear])
        return self.tokens * (attention + self._around(index) + self._feed_forward(index)) + copies

    def head(self) -> int:
        """Of final norm, head and loss (log-probabilities in float32)."""
        table = Product(self.config.hidden_size, self.config.vocab_size)
        return self.tokens * (self._normed(1) + 4 * self.config.vocab_size + 8) + self._copies([table])

    def prediction(self, index: int) -> int:
        """Of one layer for multi-token prediction: two norms joined, the layer, its own norm and loss."""
        hidden = self.config.hidden_size
        joined = 12 * hidden + 2 * _NORM_SUM + self._read(2 * hidden, 1) + (4 * hidden if self.bfloat16 else 0)
        own = joined + self._normed(1) + 4 * self.config.vocab_size + 16
        return self.tokens * own + self._copies([Product(2 * hidden, hidden)]) + self.layer(index)

    def total(self) -> int:
        """Of the whole pass."""
        first, last = self.config.num_hidden_layers, self.config.all_layers
        angles = self.tokens * 4 * self.config.rotary_dim * (1 + last - first)
        layers = sum(self.layer(index) for index in range(first)) + sum(self.prediction(index) for index in range(first, last))
        return angles + layers + self.head()

    def way_back(self, index: int) -> int:
        """Bytes made on the way back through one layer's feed-forward block: a gradient for each of its widest tensors."""
        moe = self.config.moe
        width = self.config.intermediate_size
        if moe is not None and self.config.is_moe_layer(index):
            width = moe.moe_intermediate_size * max(moe.n_shared_experts, 1) + moe.num_experts_per_tok * self.config.hidden_size
        return self.tokens * (3 * width * self._item + 2 * 4 * self.config.hidden_size)

    @property
    def _item(self) -> int:
        return 2 if self.bfloat16 else 4

    def _copies(self, linears: list[Product]) -> int:
        return sum(2 * item.count * item.size for item in linears) if self.bfloat16 else 0

    def _read(self, width: int, readers: int) -> int:
        """What `readers` products keep of one float32 input."""
        return 2 * width * readers if self.bfloat16 else 4 * width

    def _normed(self, readers: int) -> int:
        """A norm of the residual: what came in, the same scaled, what goes out to its readers."""
        return 8 * self.config.hidden_size + _NORM_SUM + self._read(self.config.hidden_size, readers)

    def _inner_norm(self, width: int, came_in: int | None = None) -> int:
        """A norm inside attention: what came in (of a wider tensor perhaps), the same scaled, what goes out."""
        return 4 * (width if self.bfloat16 or came_in is None else came_in) + _NORM_SUM + 2 * self._item * width

    def _gqa(self, a: GroupedQueryAttention) -> int:
        q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        heads_norms = (4 + self._item) * (q + kv) + _NORM_SUM * (a.num_attention_heads + a.num_key_value_heads)
        return self._normed(3) + a.qk_norm * heads_norms + self._item * (2 * q + 2 * kv) + 4 * a.num_attention_heads

    def _mla(self, a: LatentAttention) -> int:
        width, heads = a.qk_nope_head_dim + a.qk_rope_head_dim, a.num_attention_heads
        query = 0 if a.q_lora_rank is None else self._inner_norm(a.q_lora_rank)
        latent = self._inner_norm(a.kv_lora_rank, a.kv_lora_rank + a.qk_rope_head_dim)
        filled = a.v_head_dim < width  # values are filled up to the width of the keys, and the result is cut again
        values = width if filled else a.qk_nope_head_dim + a.v_head_dim
        result = width + a.v_head_dim if filled else a.v_head_dim
        return self._normed(2) + query + latent + self._item * heads * (2 * width + values + result) + 4 * heads

    def _around(self, index: int) -> int:
        """What keeping documents apart, and a reach that leaves something out, add to attention."""
        a, reach, row = self.config.attention, self.config.reach_of(index), self.row
        indexer = a.indexer if isinstance(a, LatentAttention) else None
        seen = reach.pairs(row)
        narrow = seen < row * (row + 1) // 2 or (indexer is not None and row > indexer.top_k)
        if self.packing == "mask" or (self.packing == "whole" and narrow and row < ALONE and indexer is None):
            return self._item * row
        shared, result = 1, a.num_attention_heads * (a.head_dim if isinstance(a, GroupedQueryAttention) else a.v_head_dim)
        if isinstance(a, GroupedQueryAttention):
            shared = a.num_attention_heads // a.num_key_value_heads
        elif a.v_head_dim < a.qk_nope_head_dim + a.qk_rope_head_dim:
            result = 0  # what was cut to the width of the values is a copy already
        if not narrow:
            return 0 if self.packing == "whole" else self._item * result  # the documents' results joined
        if indexer is not None:
            return self._item * (seen // row + SCORED // 2 + result)
        mask = 0 if isinstance(reach, Window) else shared * (seen // row)  # all tiles of a window share one
        return self._item * (mask + (2 if shared > 1 else 1) * result)

    def _feed_forward(self, index: int) -> int:
        moe = self.config.moe
        if moe is None or not self.config.is_moe_layer(index):
            return self._normed(2) + 4 * self._item * self.config.intermediate_size
        return self._experts(moe)

    def _experts(self, moe: MixtureOfExperts) -> int:
        hidden, item, top = self.config.hidden_size, self._item, moe.num_experts_per_tok
        shared, gated = moe.moe_intermediate_size * moe.n_shared_experts, moe.shared_expert_intermediate_size
        readers = 2 * bool(shared) + 3 * bool(gated) + 3 * moe.n_added_experts
        normed = self._normed(readers) + (4 * hidden if self.bfloat16 else 0)  # the router reads in float32
        router = 4 * moe.n_routed_experts + (8 + 4 + 4 + 16) * top + 4
        routed = top * (self._read(hidden, 2) + 4 * item * moe.moe_intermediate_size + item * hidden)
        widths = shared + gated + moe.moe_intermediate_size * moe.n_added_experts
        scaled = (bool(gated) + moe.n_added_experts) * item * (hidden + 1)
        return normed + router + routed + 4 * item * widths + scaled
