"""Which rows move on their way into a GGUF file and how, and the one tensor that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lineshaft.compress.export.exporting import export

gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'lineshaft[export]'")

Source = Callable[..., Path]


@pytest.fixture
def stored(source: Source, tmp_path: Path) -> Callable[[str], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """stored(toy): its tensors in the checkpoint, and those in its GGUF file, both as they lie there."""

    def get(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        export(source(name), tmp_path / "m.gguf", "gguf", tokenizer="none")
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        return load_file(source(name) / "model.safetensors"), {tensor.name: np.array(tensor.data) for tensor in reader.tensors}

    return get


def as_neighbours(rows: np.ndarray, heads: int, still: int = 0) -> np.ndarray:
    """Halves of each head, but for its first rows, laid out pair by pair."""
    head = rows.reshape(heads, -1, *rows.shape[1:])
    turned = head[:, still:]
    pairs = turned.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(turned.shape)
    return np.concatenate([head[:, :still], pairs], axis=1).reshape(rows.shape)


Stored = Callable[[str], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


@pytest.mark.parametrize("name", ["llama-biased", "mixtral-wide-heads", "mistral"])
def test_query_and_key_rows_of_the_architecture_llama_become_neighbours(name: str, stored: Stored) -> None:
    before, after = stored(name)
    keys = 4 if name == "mixtral-wide-heads" else 2
    for part in ("weight", "bias") if name == "llama-biased" else ("weight",):
        for ours, theirs, heads in (("q", "attn_q", 4), ("k", "attn_k", keys)):
            source = before[f"model.layers.1.self_attn.{ours}_proj.{part}"]
            assert np.array_equal(after[f"blk.1.{theirs}.{part}"], as_neighbours(source, heads))
            assert not np.array_equal(after[f"blk.1.{theirs}.{part}"], source)
        assert np.array_equal(after[f"blk.1.attn_v.{part}"], before[f"model.layers.1.self_attn.v_proj.{part}"])


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_those_of_qwen_stay(name: str, stored: Stored) -> None:
    before, after = stored(name)
    for part in ("weight", "bias") if name == "qwen2" else ("weight",):
        for ours in ("q", "k", "v"):
            assert np.array_equal(after[f"blk.1.attn_{ours}.{part}"], before[f"model.layers.1.self_attn.{ours}_proj.{part}"])


@pytest.mark.parametrize("halves", [False, True])
def test_those_of_latent_attention_move_where_they_are_in_halves(halves: bool, stored: Stored) -> None:
    before, after = stored("deepseek-half-split" if halves else "deepseek")
    at = "model.layers.1.self_attn."
    query, latent = before[f"{at}q_b_proj.weight"], before[f"{at}kv_a_proj_with_mqa.weight"]
    assert np.array_equal(after["blk.1.attn_q_b.weight"], as_neighbours(query, 4, 10) if halves else query)
    assert np.array_equal(after["blk.1.attn_kv_a_mqa.weight"], as_neighbours(latent, 1, 12) if halves else latent)
    key_value = before[f"{at}kv_b_proj.weight"].reshape(4, 10 + 8, 12)
    assert np.array_equal(after["blk.1.attn_k_b.weight"], key_value[:, :10].swapaxes(1, 2))
    assert np.array_equal(after["blk.1.attn_v_b.weight"], key_value[:, 10:])


def test_factors_of_llama3_are_those_of_transformers(source: Source, stored: Stored) -> None:
    config = transformers.AutoConfig.from_pretrained(source("llama-llama3"))
    speeds, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    _, after = stored("llama-llama3")
    assert np.allclose(after["rope_freqs.weight"], plain / speeds.numpy(), rtol=1e-6)
    assert after["rope_freqs.weight"].max() == pytest.approx(8)
