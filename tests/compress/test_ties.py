"""Which layers share a format: every layer once, those that others join together, experts as asked; sizes as they are on disk."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from filled import filled
from shapes import SHAPES

from lineshaft.base.errors import ConfigError
from lineshaft.compress.config import coding
from lineshaft.compress.ties import Tied, bytes_of, fitting, units
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE

TIES: list[Tied] = ["model", "layer", "none"]
WITH_EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3-added", "deepseek-v3-mtp", "deepseek-v32"]


@pytest.mark.parametrize("tied", TIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_is_in_one_unit_and_its_patterns_mean_just_these(shape: str, tied: Tied) -> None:
    model = Decoder(SHAPES[shape])
    found = units(model, tied=tied)
    assert sorted(name for unit in found for name in unit.layers) == sorted(model.linears())
    assert len({unit.name for unit in found}) == len(found)
    for unit in found:
        meant = {name for name in model.linears() if any(fnmatchcase(name, pattern) for pattern in unit.patterns)}
        assert meant == set(unit.layers)


def members(model: Decoder, layer: str, tied: Tied = "model") -> set[str]:
    """The layers that share a format with this one, by their last names."""
    (unit,) = [unit for unit in units(model, tied=tied) if layer in unit.layers]
    assert len({name.rpartition(".")[0] for name in unit.layers}) == 1
    return {name.split(".")[-1] for name in unit.layers}


def test_what_other_engines_lay_side_by_side_shares_a_format() -> None:
    llama, latent, indexed = (Decoder(SHAPES[shape]) for shape in ("llama", "deepseek-v3", "deepseek-v32"))
    assert members(llama, "model.layers.1.self_attn.k_proj") == {"q_proj", "k_proj", "v_proj"}
    assert members(llama, "model.layers.1.mlp.up_proj") == {"gate_proj", "up_proj"}
    assert members(llama, "model.layers.1.self_attn.o_proj") == {"o_proj"}
    assert members(llama, "lm_head") == {"lm_head"}
    assert members(latent, "model.layers.2.self_attn.q_a_proj") == {"q_a_proj", "kv_a_proj_with_mqa"}
    assert members(latent, "model.layers.2.mlp.shared_experts.gate_proj") == {"gate_proj", "up_proj"}
    assert members(indexed, "model.layers.2.self_attn.indexer.wk") == {"wk"}
    assert members(indexed, "model.layers.2.self_attn.q_b_proj") == {"q_b_proj"}
    assert members(llama, "model.layers.1.self_attn.k_proj", "none") == {"k_proj"}


@pytest.mark.parametrize("shape", WITH_EXPERTS)
def test_routed_experts_share_one_over_the_model_or_a_layer(shape: str) -> None:
    model = Decoder(SHAPES[shape])
    routed = {name for name in model.linears() if ".mlp.experts." in name}
    blocks = {name.split(".mlp.")[0] for name in routed}
    (together,) = [unit for unit in units(model) if unit.name == "experts"]
    assert set(together.layers) == routed
    assert sorted(together.patterns) == sorted(f"{block}.mlp.experts.*" for block in blocks)
    apart = {unit.name: set(unit.layers) for unit in units(model, tied="layer") if unit.name.endswith("experts")}
    assert apart == {f"{block}.mlp.experts": {name for name in routed if name.startswith(f"{block}.")} for block in blocks}


def test_what_is_skipped_is_in_no_unit_and_in_no_pattern() -> None:
    model = Decoder(SHAPES["mixtral"])
    skip = ["lm_head", "*.k_proj", "model.layers.1.mlp.experts.3.*"]
    found = units(model, skip)
    left = {name for name in model.linears() if any(fnmatchcase(name, pattern) for pattern in skip)}
    assert {name for unit in found for name in unit.layers} == model.linears().keys() - left
    assert not [name for name in left for unit in found for pattern in unit.patterns if fnmatchcase(name, pattern)]


@pytest.mark.parametrize("name", ["dense", "int8", "int8-8", "int4", "int4-8", "int4-8-zeros", "int8-a8", "int4-8-a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    for linear in filled(SHAPES["llama"]).to(dtype).linears().values():
        expected = bytes_of(linear, coding(name))
        if coding(name) != DENSE:
            linear.recode(coding(name))
        assert expected == sum(tensor.nbytes for tensor in linear.tensors().values())


def test_formats_that_do_not_fit_are_left_out_and_none_is_an_error() -> None:
    model = Decoder(SHAPES["llama"])
    wide, down = (unit for unit in units(model) if unit.name.startswith("model.layers.0.mlp"))
    assert list(fitting(model, wide, ["int4-32", "int8"])) == ["int4-32", "int8"]
    assert list(fitting(model, down, ["int4-32", "int4-20", "int8", "dense"])) == ["int4-20", "int8", "dense"]
    with pytest.raises(ConfigError, match=r"down_proj: none of int4-32 fits \(int4: 40 inputs are not a multiple of 32.*offer smaller"):
        fitting(model, down, ["int4-32"])
