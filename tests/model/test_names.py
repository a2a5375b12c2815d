"""Names in files and ours: each has one partner, and they are those that transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from toys import Theirs

from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.config import Family
from lineshaft.model.hf.names import from_file, to_file

FAMILIES = st.sampled_from(get_args(Family))
PARTS = [
    "model",
    "layers",
    "0",
    "12",
    "mlp",
    "block_sparse_moe",
    "gate",
    "gate_proj",
    "experts",
    "w1",
    "w2",
    "w3",
    "down_proj",
    "weight",
    "",
]
NAMES = st.lists(st.sampled_from(PARTS), max_size=8).map(".".join) | st.text(max_size=20)


@given(family=FAMILIES, name=NAMES | NAMES.map("model.layers.3.".__add__))
def test_every_name_comes_back(family: Family, name: str) -> None:
    assert from_file(family, to_file(family, name)) == name == to_file(family, from_file(family, name))


@given(family=FAMILIES, name=NAMES)
def test_only_mixtral_has_names_of_its_own(family: Family, name: str) -> None:
    assert (to_file(family, name) == name) or (family == "mixtral" and name.startswith("model.layers."))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.7.mlp.gate.weight", "model.layers.7.block_sparse_moe.gate.weight"),
        ("model.layers.0.mlp.experts.12.gate_proj.weight_scale", "model.layers.0.block_sparse_moe.experts.12.w1.weight_scale"),
        ("model.layers.0.mlp.experts.1.up_proj", "model.layers.0.block_sparse_moe.experts.1.w3"),
        ("model.layers.0.mlp.experts.1.down_proj.weight", "model.layers.0.block_sparse_moe.experts.1.w2.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_mixtrals_names(ours: str, theirs: str) -> None:
    assert to_file("mixtral", ours) == theirs
    assert from_file("mixtral", theirs) == ours


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v32"])
def test_names_are_those_that_transformers_writes(name: str, theirs: Callable[[str], Theirs]) -> None:
    folder = theirs(name).folder
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = set(file.keys())
    model = load_checkpoint(folder)
    assert {to_file(model.config.family, ours) for ours in model.state_dict()} == written
