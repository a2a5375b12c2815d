"""One model, two spellings of its config.json: `rope_scaling` as published checkpoints have it, `rope_parameters` since transformers 5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from toys import TOKENS, TOYS, Options, Theirs, agree, as_published, logits_of, prompt

from lineshaft.base.errors import UnsupportedModel
from lineshaft.model.checkpoint import load_checkpoint, load_config

Get = Callable[[str], Theirs]
STRETCHED = [name for name, (_, options) in TOYS.items() if options.get("rope_parameters", {}).get("rope_type", "default") != "default"]


@pytest.mark.parametrize("name", TOYS)
def test_the_published_spelling_means_the_same(name: str, theirs: Get, tmp_path: Path) -> None:
    """To us and to transformers, so that what we read is what they would run."""
    source = theirs(name).folder
    folder = as_published(name, source, tmp_path / "published")
    assert load_config(folder) == load_config(source)
    before, after = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (source, folder))
    after["rope_parameters"].pop("type", None)  # they keep the old key beside the new one
    assert {key for key in before if after[key] != before[key]} == {"_name_or_path"}


@pytest.mark.parametrize("name", [*STRETCHED, "deepseek_v2-groups", "deepseek_v32-groups", "qwen2_moe-window-in-even-layers"])
def test_the_published_spelling_runs_the_same(name: str, theirs: Get, tmp_path: Path) -> None:
    folder = as_published(name, theirs(name).folder, tmp_path / "published")
    assert agree(logits_of(load_checkpoint(folder), prompt(TOKENS)), theirs(name).logits(prompt(TOKENS)))
    again = Theirs(folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    assert agree(again.logits(prompt(TOKENS)), theirs(name).logits(prompt(TOKENS)), 0.0)


GONE = object()
"""A key that is not there."""
YARN: Options = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def scaled(table: Options | None, **others: object) -> Options:
    """rope_scaling alone, as in published files."""
    return {"rope_parameters": GONE, "rope_scaling": table, **others}


WINDOW: Options = {"use_sliding_window": True, "sliding_window": 5}
UNUSUAL: dict[str, tuple[str, Options]] = {
    "nothing about positions": ("llama", {"rope_parameters": GONE}),
    "nothing about positions, mixtral": ("mixtral", {"rope_parameters": GONE}),
    "theta alone": ("llama", scaled(None, rope_theta=500.0)),
    "theta beside a table without one": ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}),
    "two thetas": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 500.0}),
    "both tables": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_scaling": {"type": "linear", "factor": 2}},
    ),
    "an empty table": ("llama", scaled({})),
    "yarn without a trained length": ("llama", scaled({"type": "yarn", "factor": 4.0}, max_position_embeddings=32)),
    "yarn without a factor": ("llama", scaled({**YARN, "factor": None})),
    "yarn with nulls": ("llama", scaled({**YARN, "beta_fast": None, "beta_slow": None, "attention_factor": None, "mscale": None})),
    "yarn that stretches nothing": ("llama", scaled({**YARN, "factor": 1})),
    "yarn with one mscale": ("llama", scaled({**YARN, "mscale": 0.7})),
    "yarn with the trained length outside": (
        "llama",
        scaled({**YARN, "original_max_position_embeddings": 16}, original_max_position_embeddings=32),
    ),
    "yarn with an mscale of nought": ("deepseek", scaled({**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0})),
    "yarn with a length of its own, and scores": (
        "deepseek",
        scaled({**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}),
    ),
    "no head width": ("llama", {"head_dim": GONE}),
    "null head width": ("mistral", {"head_dim": None}),
    "a window that llama does not have": ("llama", {"sliding_window": 4, "use_sliding_window": True}),
    "mistral without a word of its window": ("mistral-window", {"sliding_window": GONE}),
    "mistral with layers of two kinds": ("mistral-window", {"layer_types": ["full_attention", "sliding_attention"]}),
    "mixtral without a word of its window": ("mixtral", {"sliding_window": GONE}),
    "qwen2 with windows from the first layer": ("qwen2", {**WINDOW, "max_window_layers": 0, "layer_types": GONE}),
    "qwen2 without a bound": ("qwen2", {**WINDOW, "max_window_layers": GONE, "layer_types": GONE}),
    "qwen2 with a window that is null": ("qwen2", {**WINDOW, "sliding_window": None, "max_window_layers": 0, "layer_types": GONE}),
    "qwen2 with a window that is not used": ("qwen2", {"use_sliding_window": GONE, "sliding_window": 5, "layer_types": GONE}),
    "qwen2_moe by its bound": ("qwen2_moe", {**WINDOW, "max_window_layers": 2, "layer_types": GONE}),
    "qwen2_moe without a bound": ("qwen2_moe", {**WINDOW, "max_window_layers": GONE, "layer_types": GONE}),
    "qwen2_moe without a word of its biases": ("qwen2_moe", {"qkv_bias": GONE, "norm_topk_prob": GONE}),
    "qwen3_moe with a bound": ("qwen3_moe", {**WINDOW, "max_window_layers": 2}),
    "qwen3_moe with the older name": ("qwen3_moe", {"num_local_experts": GONE, "num_experts": 8, "mlp_only_layers": None}),
    "qwen3_moe without a word of its head width": ("qwen3_moe", {"head_dim": GONE, "decoder_sparse_step": GONE}),
    "pairs, unsaid": ("deepseek", {"rope_interleave": GONE}),
    "pairs, null": ("deepseek", {"rope_interleave": None}),
    "pairs that V3.2 never splits": ("deepseek_v32", {"rope_interleave": False}),
    "dense layers by number": ("deepseek_v32", {"mlp_layer_types": GONE, "layer_types": GONE}),
    "dense layers by kind against number": ("deepseek_v32", {"mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 0}),
    "V2 without a word of its method": ("deepseek_v2", {"topk_method": GONE, "n_group": GONE, "topk_group": GONE}),
    "V2 with weights to be normalised": ("deepseek_v2", {"norm_topk_prob": True}),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_unusual_config_is_the_model_that_transformers_runs_or_is_refused(case: str, theirs: Get, tmp_path: Path) -> None:
    name, changes = UNUSUAL[case]
    folder = Path(shutil.copytree(theirs(name).folder, tmp_path / "hf"))
    hf = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not GONE}))
    try:
        ours = logits_of(load_checkpoint(folder), prompt(TOKENS))
    except UnsupportedModel:
        return
    again = Theirs(folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    assert agree(ours, again.logits(prompt(TOKENS)))
