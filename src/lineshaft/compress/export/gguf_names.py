"""Where each tensor of a model stands in a GGUF file, and how its rows move.

Names and moves are those that llama.cpp reads (its src/models). Letters: H heads, D channels of a head, C width of the latent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lineshaft.base.errors import UnsupportedModel
from lineshaft.model.config import GroupedQueryAttention, LatentAttention, ModelConfig

Move = Literal["none", "stack", "rotary", "keys", "values"]
ROPE_FACTORS = "rope_freqs.weight"
"""How much slower each pair turns (Llama 3.1); no tensor of the model, worked out from its config."""

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OF_EXPERT = re.compile(r"mlp\.experts\.\d+\.(\w+)")


@dataclass(frozen=True)
class Place:
    """A tensor of the file and what it is made of."""

    name: str
    sources: tuple[str, ...]
    """Our tensors, such as `model.norm.weight`; several only for `stack`."""
    move: Move = "none"
    """stack: experts one after another. rotary: see `Turned`. keys, values: the rows of keys or of values of each head of kv_b_proj
    [H (nope + V), C]; keys are turned over as well, to [H, C, nope]."""


@dataclass(frozen=True)
class Turned:
    """Rows in heads, of which the last are rotated: in halves for us, as neighbours for llama.cpp (its rope type "norm")."""

    heads: int
    still: int
    """First rows of each head, which do not move."""
    turned: int

    def order(self) -> list[int]:
        """For each row of the file the row of the checkpoint."""
        width, half = self.still + self.turned, self.turned // 2
        pairs = [self.still + offset for pair in range(half) for offset in (pair, pair + half)]
        return [head * width + row for head in range(self.heads) for row in (*range(self.still), *pairs)]


def places(config: ModelConfig, names: Iterable[str]) -> list[Place]:
    """The tensors of the file for the model's tensors of these names, in their order.

    Raises UnsupportedModel for one that has no place there.
    """
    found: dict[str, Place] = {}
    for name in names:
        for place in _places_of(config, name):
            before = found.get(place.name)
            found[place.name] = place if before is None else Place(place.name, before.sources + place.sources, place.move)
    return list(found.values())


def _places_of(config: ModelConfig, name: str) -> list[Place]:
    module, _, part = name.rpartition(".")
    if module in _WHOLE:
        return [Place(f"{_WHOLE[module]}.{part}", (name,))]
    matched = _LAYER.fullmatch(module)
    if matched is None:
        raise UnsupportedModel(f"export: GGUF has no place for {name}")
    block, inside = f"blk.{matched[1]}", matched[2]
    if inside == "self_attn.kv_b_proj":
        return [Place(f"{block}.attn_k_b.{part}", (name,), "keys"), Place(f"{block}.attn_v_b.{part}", (name,), "values")]
    if expert := _OF_EXPERT.fullmatch(inside):
        return [Place(f"{block}.{_EXPERT[expert[1]]}.{part}", (name,), "stack")]
    if inside == "mlp.gate" and part == "e_score_correction_bias":
        return [Place(f"{block}.exp_probs_b.bias", (name,))]
    if inside not in _IN_LAYER:
        raise UnsupportedModel(f"export: GGUF has no place for {name}")
    return [Place(f"{block}.{_IN_LAYER[inside]}.{part}", (name,), "none" if turned(config, name) is None else "rotary")]


def turned(config: ModelConfig, name: str) -> Turned | None:
    """How the rows of this tensor move, or None where they stay.

    llama.cpp rotates neighbouring channels in its architectures llama and deepseek2, halves in those of Qwen.
    """
    a, module = config.attention, name.rpartition(".")[0].rpartition(".")[2]
    if isinstance(a, GroupedQueryAttention):
        heads = {"q_proj": a.num_attention_heads, "k_proj": a.num_key_value_heads}.get(module)
        return None if heads is None or config.family.startswith("qwen") else Turned(heads, 0, a.head_dim)
    assert isinstance(a, LatentAttention)
    if a.rope_interleave:
        return None
    if module in ("q_proj", "q_b_proj"):
        return Turned(a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim)
    return Turned(1, a.kv_lora_rank, a.qk_rope_head_dim) if module == "kv_a_proj_with_mqa" else None
