"""config.json in and out: what it says is kept, what we can't run is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from toys import TOYS, Theirs

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.model.checkpoint import load_config, read_json
from lineshaft.model.config import Family, GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.hf import from_hf, to_hf

Get = Callable[[str], Theirs]
SMALL = st.integers(1, 64)
POSITIVE = st.floats(1e-8, 1e8)


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOfExperts:
    groups = draw(st.integers(1, 8))
    size = draw(st.integers(1 if groups == 1 else 2, 8))
    kept = draw(st.integers(1, groups))
    return MixtureOfExperts(
        n_routed_experts=groups * size,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        n_shared_experts=draw(st.integers(0, 4)),
        moe_intermediate_size=draw(SMALL),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(POSITIVE),
        first_k_dense_replace=draw(st.integers(0, 80)),
    )


@st.composite
def attentions(draw: st.DrawFn, family: Family) -> GroupedQueryAttention | LatentAttention:
    if family == "deepseek_v3":
        return LatentAttention(
            num_attention_heads=draw(SMALL),
            q_lora_rank=draw(st.none() | SMALL),
            kv_lora_rank=draw(SMALL),
            qk_nope_head_dim=draw(SMALL),
            qk_rope_head_dim=2 * draw(SMALL),
            v_head_dim=draw(SMALL),
            bias=draw(st.booleans()),
        )
    heads = draw(SMALL)
    bias = draw(st.booleans()) if family in ("llama", "qwen3") else False
    return GroupedQueryAttention(
        num_attention_heads=heads * draw(st.integers(1, 4)),
        num_key_value_heads=heads,
        head_dim=2 * draw(SMALL),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        qk_norm=family == "qwen3",
        sliding_window=draw(st.none() | SMALL) if family == "mistral" else None,
    )


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    family = draw(st.sampled_from(get_args(Family)))
    return ModelConfig(
        family=family,
        hidden_size=draw(SMALL),
        num_hidden_layers=draw(SMALL),
        intermediate_size=draw(SMALL),
        max_position_embeddings=draw(st.integers(1, 10**6)),
        attention=draw(attentions(family)),
        moe=draw(mixtures()) if family == "deepseek_v3" else None,
        rope_theta=draw(POSITIVE),
        rms_norm_eps=draw(POSITIVE),
        mlp_bias=family == "llama" and draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(POSITIVE),
        vocab_size=draw(SMALL),
        bos_token_id=draw(st.none() | st.integers(0, 100)),
        eos_token_ids=draw(st.lists(st.integers(0, 100), max_size=3)),
    )


@given(config=configs())
def test_a_config_comes_back_from_its_file_as_it_was(config: ModelConfig) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config, "bfloat16")))) == config


@pytest.mark.parametrize("name", TOYS)
def test_our_config_of_their_file_says_the_same_again(name: str, theirs: Get) -> None:
    ours = load_config(theirs(name).folder)
    written = to_hf(ours, "float32")
    read = read_json(theirs(name).folder, "config.json")
    # Ours are keys that older tools read; "torch_dtype" is "dtype" since transformers 5.
    new = {"rope_theta", "rope_scaling", "torch_dtype", "scoring_func", "topk_method", "moe_layer_freq", "head_dim", "initializer_range"}
    assert written.keys() - read.keys() <= new
    assert {key: value for key, value in read.items() if key in written and written[key] != value} == {}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn": ("deepseek", {"rope_scaling": {"type": "yarn", "factor": 40}}, 'rope scaling "yarn"'),
    "llama 3 positions": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, 'rope scaling "llama3"'),
    "positions by layer": ("llama", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters"),
    "half-turned heads": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "gelu": ("llama", {"hidden_act": "gelu"}, 'hidden_act "gelu"'),
    "some windows": ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "softmax router": ("deepseek", {"scoring_func": "softmax"}, "scoring_func"),
    "greedy router": ("deepseek", {"topk_method": "group_limited_greedy"}, "topk_method"),
    "half-split": ("deepseek", {"rope_interleave": False}, "rope_interleave"),
    "every other layer": ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq"),
    "no experts": ("deepseek", {"n_routed_experts": None}, "n_routed_experts"),
    "fewer keys": ("deepseek", {"num_key_value_heads": 2}, "num_key_value_heads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_we_do_not_run_is_refused_by_name(what: str, theirs: Get) -> None:
    name, change, told = REFUSED[what]
    config = read_json(theirs(name).folder, "config.json")
    assert from_hf(config)
    with pytest.raises(UnsupportedModel, match="is not supported yet") as caught:
        from_hf(config | change)
    assert told in str(caught.value)
    assert config["model_type"] in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", None, 3, ["llama"], "deepseek_v2"])
def test_another_family_is_refused_with_those_we_have(family: Any) -> None:
    with pytest.raises(UnsupportedModel, match="supported: deepseek_v3, llama, mistral, qwen2, qwen3"):
        from_hf({"model_type": family})


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "words for numbers": ("llama", {"hidden_size": "wide"}, "hidden_size"),
    "no heads": ("llama", {"num_attention_heads": 0, "head_dim": None}, "wrong type"),
    "heads in words": ("llama", {"num_attention_heads": "four", "head_dim": None}, "wrong type"),
    "flag in words": ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "end in words": ("llama", {"eos_token_id": "</s>"}, "eos_token_ids"),
    "positions in words": ("llama", {"rope_scaling": "none", "rope_parameters": None}, "wrong type"),
    "theta in words": ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
    "no scale": ("deepseek", {"routed_scaling_factor": None}, "routed_scaling_factor"),
    "group without number": ("deepseek", {"n_group": None}, "n_group"),
    "too many experts a token": ("deepseek", {"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    "odd groups": ("deepseek", {"n_group": 3}, "n_group 3"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "odd rotation": ("llama", {"head_dim": 7}, "head_dim 7"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_value_is_named(what: str, theirs: Get) -> None:
    name, change, told = BROKEN[what]
    with pytest.raises(BadCheckpoint, match=r"config.json") as caught:
        from_hf(read_json(theirs(name).folder, "config.json") | change)
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "num_attention_heads", "rms_norm_eps", "kv_lora_rank", "n_shared_experts"])
def test_a_missing_key_is_named(key: str, theirs: Get) -> None:
    config = read_json(theirs("deepseek").folder, "config.json")
    del config[key]
    with pytest.raises(BadCheckpoint, match=f"'{key}' is missing"):
        from_hf(config)


def test_a_mistral_file_that_is_silent_on_the_window_means_what_transformers_assumes(theirs: Get) -> None:
    config = read_json(theirs("mistral").folder, "config.json")
    del config["sliding_window"]
    attention = from_hf(config).attention
    assert isinstance(attention, GroupedQueryAttention)
    assert attention.sliding_window == 4096


def test_files_of_transformers_4_say_the_same(theirs: Get) -> None:
    config = read_json(theirs("llama-theta").folder, "config.json")
    del config["rope_parameters"]
    old = config | {"rope_theta": 500000.0, "rope_scaling": None}
    assert from_hf(old) == load_config(theirs("llama-theta").folder)


def test_the_end_tokens_of_the_generation_config_win(theirs: Get, tmp_path: Path) -> None:
    config = read_json(theirs("llama").folder, "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).eos_token_ids == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_config(tmp_path).eos_token_ids == [7, 9]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert load_config(tmp_path).eos_token_ids == [2]


_BASE = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 8, "vocab_size": 8}
_GQA = {"kind": "gqa", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
_MLA = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": "qwen2", "attention": _GQA}, "qkv_bias True"),
        ({"family": "llama", "attention": _GQA | {"qkv_bias": True}}, "output_bias True"),
        ({"family": "llama", "attention": _GQA | {"sliding_window": 4}}, "sliding_window None"),
        ({"family": "mistral", "attention": _GQA | {"qk_norm": True}}, "qk_norm False"),
        ({"family": "mistral", "attention": _GQA, "mlp_bias": True}, "mlp_bias False"),
        ({"family": "deepseek_v3", "attention": _MLA}, "needs experts"),
        ({"family": "deepseek_v3", "attention": _GQA}, "does not have gqa"),
        ({"family": "llama", "attention": _MLA}, "does not have mla"),
    ],
)
def test_a_model_that_no_checkpoint_could_hold_is_refused_before_it_is_trained(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ModelConfig.model_validate(_BASE | change)
