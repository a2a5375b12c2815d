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
from transformers import AutoConfig

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.model.checkpoint import load_config, read_json
from lineshaft.model.config import Family, GroupedQueryAttention, Indexer, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.hf.config import DIALECT, from_hf, is_native, meaning, to_hf
from lineshaft.model.positions import Dynamic, Linear, Llama3, Yarn
from lineshaft.ops.reach import Blocks, Causal, Window

Get = Callable[[str], Theirs]
SMALL = st.integers(1, 64)
POSITIVE = st.floats(1e-8, 1e8)


@st.composite
def mixtures(draw: st.DrawFn, layers: int) -> MixtureOfExperts:
    groups = draw(st.integers(1, 8))
    size = draw(st.integers(1 if groups == 1 else 2, 8))
    kept = draw(st.integers(1, groups))
    return MixtureOfExperts(
        n_routed_experts=groups * size,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        n_shared_experts=draw(st.integers(0, 4)),
        shared_expert_intermediate_size=draw(st.just(0) | SMALL),
        moe_intermediate_size=draw(SMALL),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(POSITIVE),
        first_k_dense_replace=draw(st.integers(0, 80)),
        mlp_only_layers=draw(st.lists(st.integers(0, layers - 1), max_size=3)),
        n_added_experts=draw(st.integers(0, 2)),
    )


@st.composite
def attentions(draw: st.DrawFn, family: Family) -> GroupedQueryAttention | LatentAttention:
    if family.startswith("deepseek"):
        rank, rotated = draw(st.none() | SMALL), 2 * draw(SMALL)
        indexer = Indexer(num_heads=draw(SMALL), head_dim=rotated + draw(SMALL), top_k=draw(SMALL))
        return LatentAttention(
            num_attention_heads=draw(SMALL),
            q_lora_rank=rank,
            kv_lora_rank=draw(SMALL),
            qk_nope_head_dim=draw(SMALL),
            qk_rope_head_dim=rotated,
            v_head_dim=draw(SMALL),
            bias=draw(st.booleans()),
            rope_interleave=draw(st.booleans()),
            indexer=indexer if rank is not None and draw(st.booleans()) else None,
        )
    heads = draw(SMALL)
    return GroupedQueryAttention(
        num_attention_heads=heads * draw(st.integers(1, 4)),
        num_key_value_heads=heads,
        head_dim=2 * draw(SMALL),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


REACHES = (
    st.builds(Causal)
    | st.builds(Window, window=SMALL, global_tokens=st.integers(0, 4))
    | st.builds(Blocks, block=SMALL, local_blocks=SMALL, stride=SMALL)
)
SCALINGS = (
    st.builds(Linear, factor=POSITIVE)
    | st.builds(Dynamic, factor=POSITIVE)
    | st.builds(
        Llama3, factor=POSITIVE, low_freq_factor=st.just(1.0), high_freq_factor=st.floats(1.5, 9), original_max_position_embeddings=SMALL
    )
    | st.builds(
        Yarn,
        factor=POSITIVE,
        original_max_position_embeddings=SMALL,
        beta_fast=POSITIVE,
        beta_slow=POSITIVE,
        truncate=st.booleans(),
        mscale=st.just(0.0) | POSITIVE,
        mscale_all_dim=st.just(0.0) | POSITIVE,
        attention_factor=st.none() | POSITIVE,
    )
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any model, also those that no config.json of their family could describe."""
    family, layers = draw(st.sampled_from(get_args(Family))), draw(st.integers(1, 8))
    latent = family.startswith("deepseek")
    return ModelConfig(
        family=family,
        hidden_size=draw(SMALL),
        num_hidden_layers=layers,
        intermediate_size=draw(SMALL),
        max_position_embeddings=draw(st.integers(1, 10**6)),
        attention=draw(attentions(family)),
        reach=draw(st.lists(REACHES, min_size=1, max_size=layers)),
        moe=draw(mixtures(layers)) if latent or family.endswith(("_moe", "mixtral")) else None,
        num_nextn_predict_layers=draw(st.integers(0, 2)) if latent else 0,
        rope_theta=draw(POSITIVE),
        rope_scaling=draw(st.none() | SCALINGS),
        rms_norm_eps=draw(POSITIVE),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(POSITIVE),
        vocab_size=draw(SMALL),
        bos_token_id=draw(st.none() | st.integers(0, 100)),
        eos_token_ids=draw(st.lists(st.integers(0, 100), max_size=3)),
    )


@given(config=configs())
def test_a_config_comes_back_from_its_file_as_it_was(config: ModelConfig) -> None:
    assert meaning(from_hf(json.loads(json.dumps(to_hf(config, "bfloat16"))))) == meaning(config)


@pytest.mark.parametrize("name", TOYS)
def test_our_config_of_their_file_says_the_same_again(name: str, theirs: Get) -> None:
    ours = load_config(theirs(name).folder)
    assert is_native(ours)
    written = to_hf(ours, "float32")
    read = read_json(theirs(name).folder, "config.json")
    again = AutoConfig.for_model(**{key: value for key, value in written.items() if key != "architectures"}).to_dict()
    told = {key: (value, again.get(key)) for key, value in read.items() if again.get(key) != value}
    # Said otherwise, but meaning the same: every second layer as a list of layers, windows as a list of layers.
    otherwise = {"architectures", "dtype", "transformers_version", "decoder_sparse_step", "mlp_only_layers", "max_window_layers"}
    # Nothing that a model is made of: a window that is switched off, what training adds to the loss.
    idle = {"sliding_window", "use_sliding_window", "topk_method", "n_group", "topk_group", "rope_parameters", "head_dim"}
    assert told.keys() <= otherwise | idle, told
    assert meaning(from_hf(again)) == meaning(ours)


DIALECTS: dict[str, dict[str, Any]] = {
    "global tokens": {"reach": [{"kind": "window", "window": 4, "global_tokens": 2}]},
    "blocks": {"reach": [{"kind": "blocks", "block": 4, "stride": 2}]},
    "a window in a family without": {"reach": [{"kind": "window", "window": 4}]},
    "head norms in a family without": {"attention": {"qk_norm": True}},
    "a bias on one side": {"attention": {"qkv_bias": True}},
}


@pytest.mark.parametrize("what", DIALECTS)
def test_what_the_family_has_no_words_for_is_not_taken_for_another_model(what: str, tmp_path: Path) -> None:
    change = DIALECTS[what] | {"attention": _GQA | DIALECTS[what].get("attention", {})}
    config = ModelConfig.model_validate(_BASE | {"family": "llama", "num_hidden_layers": 2} | change)
    written = to_hf(config, "float32")
    assert not is_native(config)
    assert written["model_type"] == DIALECT
    assert from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="lineshaft"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_description_under_our_own_name_must_be_there() -> None:
    with pytest.raises(BadCheckpoint, match='needs the description of the model under "lineshaft"'):
        from_hf({"model_type": DIALECT})


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, 'rope scaling "longrope"'),
    "positions by layer": ("llama", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters"),
    "half-turned heads": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "gelu": ("llama", {"hidden_act": "gelu"}, 'hidden_act "gelu"'),
    "windows in a llama": ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "other layers": ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    "scores scaled without yarn": ("deepseek", {"rope_scaling": {"type": "linear", "factor": 2, "mscale_all_dim": 1}}, "mscale_all_dim"),
    "softmax router": ("deepseek", {"scoring_func": "softmax"}, "scoring_func"),
    "greedy router": ("deepseek", {"topk_method": "group_limited_greedy"}, "topk_method"),
    "sigmoid router in V2": ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    "normalised weights in V2": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    "biased V2": ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
    "every other layer": ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq"),
    "no experts": ("deepseek", {"n_routed_experts": None}, "n_routed_experts"),
    "fewer keys": ("deepseek", {"num_key_value_heads": 2}, "num_key_value_heads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_we_do_not_run_is_refused_by_name(what: str, theirs: Get) -> None:
    name, change, told = REFUSED[what]
    config = read_json(theirs(name).folder, "config.json")
    assert from_hf(config)
    with pytest.raises(UnsupportedModel, match=r"(is|are) not supported yet") as caught:
        from_hf(config | change)
    assert told in str(caught.value)
    assert config["model_type"] in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", None, 3, ["llama"], "deepseek_v4"])
def test_another_family_is_refused_with_those_we_have(family: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"supported: deepseek_v2, deepseek_v3, .*, qwen3_moe$"):
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
    assert from_hf(config).reach == [Window(window=4096)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "use_sliding_window is not set"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 2 layers"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types must name 2 layers"),
    ],
)
def test_layer_types_that_do_not_fit_are_named(change: dict[str, Any], told: str, theirs: Get) -> None:
    with pytest.raises(BadCheckpoint, match=told):
        from_hf(read_json(theirs("qwen2").folder, "config.json") | change)


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
_MOE = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
_INDEXER = {"num_heads": 2, "head_dim": 4, "top_k": 3}
_MLA = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": "deepseek_v3", "attention": _MLA}, "needs experts"),
        ({"family": "mixtral", "attention": _GQA}, "needs experts"),
        ({"family": "deepseek_v3", "attention": _GQA}, "does not have gqa"),
        ({"family": "llama", "attention": _MLA}, "does not have mla"),
        ({"family": "llama", "attention": _GQA, "moe": _MOE}, "has no experts"),
        ({"family": "llama", "attention": _GQA, "reach": [{"kind": "causal"}] * 2}, "reach names 2 layers of 1"),
        ({"family": "llama", "attention": _GQA, "num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"family": "mixtral", "attention": _GQA, "moe": _MOE | {"mlp_only_layers": [1]}}, "layers that do not exist"),
        ({"family": "deepseek_v3", "attention": _MLA | {"indexer": _INDEXER}, "moe": _MOE}, "set q_lora_rank"),
        ({"family": "deepseek_v3", "attention": _MLA | {"q_lora_rank": 4, "indexer": _INDEXER | {"head_dim": 1}}, "moe": _MOE}, "no room"),
    ],
)
def test_a_model_that_does_not_hold_together_is_refused_before_it_is_trained(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ModelConfig.model_validate(_BASE | change)
