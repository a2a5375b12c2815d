"""Checkpoints for exports: toys whose layers have whole blocks of 32 inputs, compressed as asked for, with tokenizers of known cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import toys
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lineshaft.compress.config import CompressConfig
from lineshaft.compress.stage import compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.text.cuts import CUTS as OURS
from lineshaft.text.tokenizer import byte_alphabet

Options = dict[str, Any]

_WIDE: Options = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_LATENT: Options = {
    **{**toys._MLA, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
    **{"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
WIDE: dict[str, tuple[str, Options]] = {
    "wide-llama": ("Llama", _WIDE),
    "wide-llama-tied": ("Llama", {**_WIDE, "tie_word_embeddings": True, "attention_bias": True}),
    "wide-mixtral": ("Mixtral", {**_WIDE, **toys._MIXTRAL, "num_local_experts": 4}),
    "wide-qwen2": ("Qwen2", _WIDE),
    "wide-qwen3": ("Qwen3", {**_WIDE, "head_dim": 32}),
    "wide-qwen3_moe": ("Qwen3Moe", {**toys._QWEN3_MOE, **_WIDE, "head_dim": 32, "moe_intermediate_size": 32}),
    "wide-deepseek": ("DeepseekV3", _LATENT),
    "wide-deepseek-half-split": ("DeepseekV3", {**_LATENT, "rope_interleave": False}),
    "wide-deepseek_v2": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "norm_topk_prob": False, "topk_method": "greedy"}),
    "spoken-llama": ("Llama", {**_WIDE, "vocab_size": 720}),
    "broad-llama": ("Llama", {**_WIDE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}),
}
"""Inputs of every layer are multiples of 32; those of `broad` ones of 128. `spoken` has room for a tokenizer of its own."""

FORMS: dict[str, tuple[Options, str]] = {
    "int8": ({}, "Q8_0"),
    "int8-32": ({"group": 32}, "Q8_0"),
    "int8-a8": ({"group": 32, "activations": "int8"}, "Q8_0"),
    "int4": ({"format": "int4"}, "Q4_0"),
    "int4-32": ({"format": "int4", "group": 32}, "Q4_0"),
    "int4-32-zeros": ({"format": "int4", "group": 32, "symmetric": False}, "Q4_1"),
}
"""Form to (how it is asked for, the kind of GGUF that says it)."""


def made(name: str, folder: Path) -> Path:
    """The checkpoint of a toy, there or here, written by transformers."""
    with patch.dict(toys.TOYS, WIDE):
        return toys.written_by_transformers(name, folder).folder


def compressed(source: Path, folder: Path, form: str, dense: str | None = None) -> Path:
    """The same checkpoint with its layers in one of FORMS, but for those that a pattern `dense` means."""
    model = load_checkpoint(source)
    compress(model, CompressConfig(**FORMS[form][0], policy={} if dense is None else {dense: "dense"}))
    save_checkpoint(model, folder, source)
    return folder


def in_bfloat16(source: Path, folder: Path) -> Path:
    """The same checkpoint with its weights cast."""
    save_checkpoint(load_checkpoint(source, dtype=torch.bfloat16), folder, source)
    return folder


_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[str, tuple[list[str], Options]] = {
    "llama-bpe": ([_ENGLISH + r"\p{N}{1,3}" + _REST], {"ignore_merges": True}),
    "smaug-bpe": ([_ENGLISH + r"\p{N}{1,3}" + _REST], {}),
    "qwen2": ([_ENGLISH + r"\p{N}" + _REST], {}),
    "deepseek-v3": (
        [
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
            "\r\n"
            r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
            "\r\n"
            r"]*|\s*["
            "\r\n"
            r"]+|\s+(?!\S)|\s+",
        ],
        {},
    ),
    "gpt-2": ([], {}),
    "ours": (list(OURS["words"]), {}),
}
"""How the published tokenizers cut texts, by llama.cpp's names, and how ours do, for which it has none."""

SENTENCES = (
    "The quick brown fox doesn't jump over 12345 lazy dogs; it'll sleep.\n\n  And so\tdo WE, I'd say...\r\n",
    "中文分词测试：他们在2024年12月31日买了三千五百个苹果，真的吗？「是的」！",
    "日本語のテキスト、カタカナとひらがな。한국어 문장도 있습니다. Привет, мир! Ελληνικά",
    "def f(x):\n    return x**2 + 1  # 注释 comment\n\n\nclass A_b: pass\n",
    "café naïve cafe\u0301 — “quotes” 👩‍👩‍👧 🎉🎉  trailing   ",
    "   leading spaces\n \n\t\tmixed \u3000 wide space\u00a0nbsp 1 22 333 4444 55555",
)
SPECIAL, VISIBLE = ("<|bos|>", "<|eos|>"), ("<think>",)


def tokenizer_of(cut: str, vocabulary: int = 700) -> Tokenizer:
    """A byte-level BPE trained on SENTENCES that cuts texts in one of CUTS."""
    patterns, options = CUTS[cut]
    bpe = Tokenizer(models.BPE(**options))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)])
    bpe.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        bpe.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=sorted(byte_alphabet()), show_progress=False
    )
    bpe.train_from_iterator([sentence for sentence in SENTENCES for _ in range(3)], trainer)
    bpe.add_tokens([AddedToken(token, normalized=False) for token in VISIBLE])
    return bpe


def with_tokenizer(folder: Path, cut: str) -> Path:
    """Give a checkpoint's folder a tokenizer."""
    (folder / "tokenizer.json").write_text(tokenizer_of(cut).to_str(), encoding="utf-8")
    said = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder
