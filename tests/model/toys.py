"""Small models with every option that counts: transformers builds them with random weights, and is the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder

VOCABULARY = 61
TOKENS = 40
"""Longer than every window here."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_mtp_layers": 0,
}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("DeepseekV3", _MLA),
    "deepseek-direct-query": ("DeepseekV3", {**_MLA, "q_lora_rank": None}),
    "deepseek-groups": ("DeepseekV3", {**_MLA, "n_group": 4, "topk_group": 2}),
    "deepseek-one-group-of-four": ("DeepseekV3", {**_MLA, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}),
    "deepseek-no-dense-layer": ("DeepseekV3", {**_MLA, "first_k_dense_replace": 0}),
    "deepseek-all-dense": ("DeepseekV3", {**_MLA, "first_k_dense_replace": 3}),
    "deepseek-two-shared": ("DeepseekV3", {**_MLA, "n_shared_experts": 2}),
    "deepseek-weights-as-they-are": ("DeepseekV3", {**_MLA, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "deepseek-biased": ("DeepseekV3", {**_MLA, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "deepseek-everything": (
        "DeepseekV3",
        {**_MLA, "n_group": 4, "topk_group": 3, "n_shared_experts": 2, "q_lora_rank": None, "rope_parameters": _theta(500.0)},
    ),
    "llama": ("Llama", _GQA),
    "llama-mha": ("Llama", {**_GQA, "num_key_value_heads": 4}),
    "llama-one-key-head": ("Llama", {**_GQA, "num_key_value_heads": 1}),
    "llama-biased": ("Llama", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {**_GQA, "tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {**_GQA, "head_dim": 14}),
    "llama-theta": ("Llama", {**_GQA, "rope_parameters": _theta(500000.0), "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {**_GQA, "sliding_window": None}),
    "mistral-window": ("Mistral", {**_GQA, "sliding_window": 7}),
    "mistral-window-of-two": ("Mistral", {**_GQA, "sliding_window": 2}),
    "mistral-wide-heads": ("Mistral", {**_GQA, "sliding_window": 16, "head_dim": 12}),
    "qwen2": ("Qwen2", _GQA),
    "qwen2-tied": ("Qwen2", {**_GQA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 8}),
    "qwen3-biased": ("Qwen3", {**_GQA, "head_dim": 16, "attention_bias": True}),
    "qwen3-tied": ("Qwen3", {**_GQA, "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1}),
}


@dataclass(frozen=True)
class Theirs:
    """A checkpoint that transformers wrote, and its model."""

    folder: Path
    model: Any

    def logits(self, tokens: list[int]) -> Tensor:
        """[T, vocabulary] of one document."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` most likely tokens, by their cached generation."""
        self.model.generation_config.eos_token_id = None
        with torch.inference_mode():
            given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
            out = self.model.generate(**given, max_new_tokens=count, do_sample=False)
        return out[0, len(prompt) :].tolist()


def written_by_transformers(name: str, folder: Path) -> Theirs:
    """Build, randomise so that every number matters, and save."""
    family, options = TOYS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    buffers = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    with torch.no_grad():
        for which, tensor in [*model.named_parameters(), *buffers]:
            around = 1.0 if which.endswith("norm.weight") else 0.0
            tensor.normal_(around, 0.3 if tensor.ndim == 1 else 0.2, generator=generator)
    model.save_pretrained(folder)
    return Theirs(folder, model)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: Decoder, tokens: list[int]) -> Tensor:
    """Ours, [T, vocabulary] of one document."""
    with torch.inference_mode():
        return model(torch.tensor(tokens), torch.arange(len(tokens)), PackedCausal([0], len(tokens)))


def greedy_of(model: Decoder, tokens: list[int], count: int) -> list[int]:
    """Ours: the next `count` most likely tokens, the whole text run anew for each."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(logits_of(model, text)[-1].argmax()))
    return text[len(tokens) :]


def agree(ours: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal within `tolerance`, absolute or relative."""
    return ours.shape == other.shape and torch.allclose(ours.float(), other.float(), rtol=tolerance, atol=tolerance)
