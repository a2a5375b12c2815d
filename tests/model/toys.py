"""Small models with every option that counts: transformers builds them with random weights, and is the oracle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder

Options = dict[str, Any]

VOCABULARY = 61
TOKENS = 40
"""Longer than every window here but one, and than every context that a scaling of positions says was trained."""

_SHAPE: Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GQA: Options = {"num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS: Options = {
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
}
_LATENT: Options = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
}
_MLA: Options = {**_LATENT, **_EXPERTS, "num_mtp_layers": 0}
_V2: Options = {**_LATENT, **_EXPERTS, "n_shared_experts": 2, "norm_topk_prob": False, "topk_method": "greedy"}
_V32: Options = {**_LATENT, **_EXPERTS, "index_topk": 8, "index_head_dim": 12, "index_n_heads": 16}
"""Many index heads: keys that all of them score zero tie, and then their cached and uncached passes choose different ones."""
_QWEN2_MOE: Options = {
    **_GQA,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
}
_QWEN3_MOE: Options = {
    **{name: value for name, value in _QWEN2_MOE.items() if not name.startswith("shared")},
    "head_dim": 8,
    "num_key_value_heads": 2,
}
_MIXTRAL: Options = {**_GQA, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}
_GROUPS: Options = {"n_group": 4, "topk_group": 2}


def _rope(theta: float, rope_type: str = "default", **options: Any) -> Options:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **options}}


def _yarn(**options: Any) -> Options:
    """Trained on 32 tokens and stretched by 40, as DeepSeek-V3 is from 4096. Of 8 speeds, one or two stay, two or three change partly."""
    table = {"factor": 40.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, **options}
    kept = {name: value for name, value in table.items() if value is not None}
    return {"qk_rope_head_dim": 16, "max_position_embeddings": 1280, **_rope(100.0, "yarn", **kept)}


def _gqa_yarn(**options: Any) -> Options:
    """The same for a family whose whole heads of 16 are rotated. Only DeepSeek's attention multiplies its scores by mscale."""
    table = {"factor": 4.0, "original_max_position_embeddings": 32, **options}
    return {"head_dim": 16, **_rope(100.0, "yarn", **table)}


_LLAMA3: Options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def _deepseek_v3_grid() -> dict[str, tuple[str, Options]]:
    """Every combination of the four options that re-implementations get wrong."""
    grid = {}
    for yarn, q_rank, groups, dense in product((False, True), (20, None), (1, 4), (0, 1)):
        name = f"grid-{'yarn' if yarn else 'plain'}-{'qlora' if q_rank else 'direct'}-{groups}groups-{dense}dense"
        options = {**_MLA, "q_lora_rank": q_rank, "first_k_dense_replace": dense, **(_GROUPS if groups == 4 else {})}
        grid[name] = ("DeepseekV3", {**options, **(_yarn() if yarn else {})})
    return grid


TOYS: dict[str, tuple[str, Options]] = {
    "deepseek": ("DeepseekV3", _MLA),
    "deepseek-direct-query": ("DeepseekV3", {**_MLA, "q_lora_rank": None}),
    "deepseek-groups": ("DeepseekV3", {**_MLA, **_GROUPS}),
    "deepseek-one-group-of-four": ("DeepseekV3", {**_MLA, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}),
    "deepseek-no-dense-layer": ("DeepseekV3", {**_MLA, "first_k_dense_replace": 0}),
    "deepseek-all-dense": ("DeepseekV3", {**_MLA, "first_k_dense_replace": 3}),
    "deepseek-two-shared": ("DeepseekV3", {**_MLA, "n_shared_experts": 2}),
    "deepseek-weights-as-they-are": ("DeepseekV3", {**_MLA, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "deepseek-biased": ("DeepseekV3", {**_MLA, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "deepseek-everything": (
        "DeepseekV3",
        {**_MLA, "n_group": 4, "topk_group": 3, "n_shared_experts": 2, "q_lora_rank": None, **_rope(500.0)},
    ),
    **_deepseek_v3_grid(),
    "deepseek-yarn-two-mscales": ("DeepseekV3", {**_MLA, **_yarn(mscale=1.3, mscale_all_dim=0.6)}),
    "deepseek-yarn-no-mscale": ("DeepseekV3", {**_MLA, **_yarn(mscale=None, mscale_all_dim=None)}),
    "deepseek-yarn-one-mscale": ("DeepseekV3", {**_MLA, **_yarn(mscale=None, mscale_all_dim=0.8)}),
    "deepseek-half-split": ("DeepseekV3", {**_MLA, "rope_interleave": False}),
    "deepseek-half-split-yarn": ("DeepseekV3", {**_MLA, "rope_interleave": False, **_yarn()}),
    "deepseek_v2": ("DeepseekV2", _V2),
    "deepseek_v2-direct-query": ("DeepseekV2", {**_V2, "q_lora_rank": None, "n_group": None, "topk_group": None}),
    "deepseek_v2-groups": ("DeepseekV2", {**_V2, **_GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "deepseek_v2-one-group-of-four": (
        "DeepseekV2",
        {**_V2, "n_group": 4, "topk_group": 1, "topk_method": "group_limited_greedy", "num_experts_per_tok": 2},
    ),
    "deepseek_v2-one-group": ("DeepseekV2", {**_V2, "topk_method": "group_limited_greedy"}),
    "deepseek_v2-greedy-for-all-its-groups": ("DeepseekV2", {**_V2, **_GROUPS}),
    "deepseek_v2-no-dense-layer": ("DeepseekV2", {**_V2, "first_k_dense_replace": 0, "n_shared_experts": 1}),
    "deepseek_v2-biased": ("DeepseekV2", {**_V2, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "deepseek_v2-yarn": ("DeepseekV2", {**_V2, **_yarn(mscale=0.707, mscale_all_dim=0.707)}),
    "deepseek_v2-yarn-two-mscales": ("DeepseekV2", {**_V2, **_yarn(mscale=1.0, mscale_all_dim=0.5), "q_lora_rank": None}),
    "deepseek_v2-yarn-groups": (
        "DeepseekV2",
        {**_V2, **_GROUPS, **_yarn(mscale=0.707, mscale_all_dim=0.707), "topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "deepseek_v32": ("DeepseekV32", _V32),
    "deepseek_v32-sees-all": ("DeepseekV32", {**_V32, "index_topk": 500}),
    "deepseek_v32-sees-one": ("DeepseekV32", {**_V32, "index_topk": 1, "first_k_dense_replace": 0}),
    "deepseek_v32-yarn": ("DeepseekV32", {**_V32, **_yarn(), "index_head_dim": 20, "index_topk": 10}),
    "deepseek_v32-groups": ("DeepseekV32", {**_V32, **_GROUPS, "index_topk": 16, "first_k_dense_replace": 0}),
    "deepseek_v32-biased": ("DeepseekV32", {**_V32, "attention_bias": True, "rms_norm_eps": 1e-3, "index_head_dim": 6}),
    "llama": ("Llama", _GQA),
    "llama-mha": ("Llama", {**_GQA, "num_key_value_heads": 4}),
    "llama-one-key-head": ("Llama", {**_GQA, "num_key_value_heads": 1}),
    "llama-biased": ("Llama", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {**_GQA, "tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {**_GQA, "head_dim": 14}),
    "llama-theta": ("Llama", {**_GQA, "rms_norm_eps": 1e-5, **_rope(500000.0)}),
    "llama-linear": ("Llama", {**_GQA, **_rope(10000.0, "linear", factor=4.0)}),
    "llama-dynamic": ("Llama", {**_GQA, **_rope(10000.0, "dynamic", factor=3.0)}),
    "llama-llama3": ("Llama", {**_GQA, "head_dim": 16, **_rope(100.0, "llama3", **_LLAMA3)}),
    "llama-yarn": ("Llama", {**_GQA, **_gqa_yarn()}),
    "llama-yarn-factor-of-its-own": ("Llama", {**_GQA, **_gqa_yarn(attention_factor=1.3)}),
    "llama-yarn-other-betas": ("Llama", {**_GQA, **_gqa_yarn(beta_fast=4.0, beta_slow=0.5)}),
    "llama-yarn-untruncated": ("Llama", {**_GQA, **_gqa_yarn(truncate=False)}),
    "llama-yarn-two-mscales": ("Llama", {**_GQA, **_gqa_yarn(mscale=1.3, mscale_all_dim=0.6)}),
    "mistral": ("Mistral", {**_GQA, "sliding_window": None}),
    "mistral-window": ("Mistral", {**_GQA, "sliding_window": 7}),
    "mistral-window-of-two": ("Mistral", {**_GQA, "sliding_window": 2}),
    "mistral-window-of-one": ("Mistral", {**_GQA, "sliding_window": 1}),
    "mistral-window-beyond-the-text": ("Mistral", {**_GQA, "sliding_window": 100}),
    "mistral-wide-heads": ("Mistral", {**_GQA, "sliding_window": 16, "head_dim": 12}),
    "mistral-window-linear": ("Mistral", {**_GQA, "sliding_window": 7, **_rope(10000.0, "linear", factor=2.0)}),
    "mixtral": ("Mixtral", _MIXTRAL),
    "mixtral-window": ("Mixtral", {**_MIXTRAL, "sliding_window": 7}),
    "mixtral-one-expert-tied": ("Mixtral", {**_MIXTRAL, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "mixtral-wide-heads": ("Mixtral", {**_MIXTRAL, "head_dim": 12, "num_key_value_heads": 4, **_rope(10000.0)}),
    "qwen2": ("Qwen2", _GQA),
    "qwen2-tied": ("Qwen2", {**_GQA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-window-in-upper-layers": (
        "Qwen2",
        {**_GQA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-window-by-layer-types": (
        "Qwen2",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-window-of-no-layer": ("Qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {**_GQA, "hidden_size": 64, **{key: value for key, value in _gqa_yarn().items() if key != "head_dim"}}),
    "qwen2_moe": ("Qwen2Moe", _QWEN2_MOE),
    "qwen2_moe-weights-as-they-are": ("Qwen2Moe", {**_QWEN2_MOE, "norm_topk_prob": False}),
    "qwen2_moe-unbiased": ("Qwen2Moe", {**_QWEN2_MOE, "qkv_bias": False, "tie_word_embeddings": True}),
    "qwen2_moe-dense-layers": ("Qwen2Moe", {**_QWEN2_MOE, "mlp_only_layers": [0, 2]}),
    "qwen2_moe-every-second-layer": ("Qwen2Moe", {**_QWEN2_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen2_moe-window-in-even-layers": (
        "Qwen2Moe",
        {**_QWEN2_MOE, "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4},
    ),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 8}),
    "qwen3-biased": ("Qwen3", {**_GQA, "head_dim": 16, "attention_bias": True}),
    "qwen3-tied": ("Qwen3", {**_GQA, "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-yarn": ("Qwen3", {**_GQA, **_gqa_yarn()}),
    "qwen3-window-in-upper-layers": (
        "Qwen3",
        {**_GQA, "head_dim": 8, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3-window-by-layer-types": (
        "Qwen3",
        {
            **_GQA,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe": ("Qwen3Moe", _QWEN3_MOE),
    "qwen3_moe-weights-as-they-are": ("Qwen3Moe", {**_QWEN3_MOE, "norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe-dense-layers": ("Qwen3Moe", {**_QWEN3_MOE, "mlp_only_layers": [1], "tie_word_embeddings": True}),
    "qwen3_moe-every-second-layer": ("Qwen3Moe", {**_QWEN3_MOE, "decoder_sparse_step": 2}),
    "qwen3_moe-window": ("Qwen3Moe", {**_QWEN3_MOE, "use_sliding_window": True, "sliding_window": 7}),
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

    def prefers(self, prompt: list[int], answer: list[int]) -> bool:
        """Is each token of this answer the most likely one after what is before it?

        By induction it is so exactly when `answer` is their greedy answer: one pass instead of one a token.
        """
        chosen = self.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :].argmax(-1)
        return chosen.tolist() == answer


def written_by_transformers(name: str, folder: Path) -> Theirs:
    """Build, randomise so that every number matters, and save."""
    family, options = TOYS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    buffers = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    with torch.no_grad():
        for which, tensor in [*model.named_parameters(), *buffers]:
            tensor.copy_(_random(which, tensor, generator))
    model.save_pretrained(folder)
    return Theirs(folder, model)


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Wild enough that every number and option shows in the logits, tame enough that rounding does not.

    With matrices of 0.2 transformers' own two attention kernels differ by more than 1e-5 in some of these models.
    """
    around = 1.0 if name.endswith("norm.weight") else 0.0
    return torch.empty_like(tensor).normal_(around, 0.3 if tensor.ndim == 1 else 0.12, generator=generator)


_SAID_BY_DEEPSEEK: Options = {"moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1}
_PUBLISHED: dict[str, Options] = {
    "DeepseekV2": {**_SAID_BY_DEEPSEEK, "scoring_func": "softmax"},
    "DeepseekV3": {**_SAID_BY_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "DeepseekV32": {**_SAID_BY_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
"""What published config.json files say beyond what transformers reads, all of which it takes for granted."""


def as_published(name: str, source: Path, folder: Path) -> Path:
    """A copy of a toy's checkpoint whose config.json has the keys of transformers 4, as nearly all published ones have."""
    family, options = TOYS[name]
    shutil.copytree(source, folder)
    path = folder / "config.json"
    hf = json.loads(path.read_text())
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    hf["rope_scaling"] = None if rope["type"] == "default" else rope
    hf["torch_dtype"] = hf.pop("dtype")
    hf = {key: value for key, value in hf.items() if key not in ("layer_types", "mlp_layer_types") or key in options}
    path.write_text(json.dumps(hf | _PUBLISHED.get(family, {}), indent=2))
    return folder


def with_prediction_layers(source: Path, folder: Path, count: int, *, copies: bool = False) -> Path:
    """A copy of a DeepSeek-V3 checkpoint with `count` random multi-token-prediction layers, as DeepSeek publishes them.

    Layer i of them is `model.layers.{num_hidden_layers + i}`: `enorm` (of the next token's embedding), `hnorm` (of the hidden
    state), `eh_proj` (from [embedding, hidden]), a whole decoder layer with experts, and `shared_head.norm`. `copies`: also
    `embed_tokens` and `shared_head.head`, the copies of the model's own table and head that the published files carry.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text())
    first, hidden = hf["num_hidden_layers"], hf["hidden_size"]
    last = f"model.layers.{first - 1}."
    shapes = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    shapes |= {name: torch.empty(hidden) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    shapes["eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
    generator = torch.Generator().manual_seed(count)
    for layer in range(first, first + count):
        tensors |= {f"model.layers.{layer}.{name}": _random(name, tensor, generator) for name, tensor in sorted(shapes.items())}
        if copies:
            tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(hf | {"num_nextn_predict_layers": count}, indent=2))
    return folder


def predicted_by_transformers(folder: Path, tokens: list[int]) -> list[Tensor]:
    """What their MtpModel makes of a text of T tokens: for each prediction layer k = 0, 1, ... logits [T - 1 - k, vocabulary].

    Row t of layer k speaks of token t + k + 2. Layer 0 takes the model's hidden states AFTER the final norm (what
    `hidden_states[-1]` of generation holds) with the embeddings of the tokens one further; layer k takes what layer k - 1 gives,
    AFTER its `shared_head.norm`, again one token further. Layer k's tokens have the position they have in the text.
    """
    main = load_with_prediction_layers(folder)
    layers = MtpModel.from_pretrained(main).eval()
    out = []
    with torch.inference_mode():
        hidden = main.model(torch.tensor([tokens])).last_hidden_state
        for k in range(layers.num_mtp_layers):
            ahead = torch.tensor([tokens[k + 1 :]])
            positions = torch.arange(k + 1, len(tokens))[None]
            hidden = layers.forward_layer(k, hidden[:, :-1], positions, MtpCache(config=main.config.get_mtp_config()), input_ids=ahead)
            out.append(layers.shared_head(hidden)[0])
    return out


def load_with_prediction_layers(folder: Path) -> Any:
    """Their main model of a checkpoint with prediction layers.

    It passes over names that fit a class attribute, which names layer 61 alone; MtpModel later loads what fits it.
    """
    kind = transformers.DeepseekV3ForCausalLM
    first = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    before = kind._keys_to_ignore_on_load_unexpected
    kind._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*" for layer in range(first, first + 2)]
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert {what: found for what, found in info.items() if found} == {}
        model._keys_to_ignore_on_load_unexpected = kind._keys_to_ignore_on_load_unexpected
        return model.eval()
    finally:
        kind._keys_to_ignore_on_load_unexpected = before


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
