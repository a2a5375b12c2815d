"""Which layer is stored how: what we write is what we read, what others write is read or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given
from hypothesis import strategies as st
from integer_cases import KINDS
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import FineGrainedFP8Config

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops.formats import DENSE, Activations, Format, Fp8Block, Integer
from lineshaft.ops.quantization import from_quantization_config, to_quantization_config

DEEPSEEK: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""Word for word that of DeepSeek-V3's config.json."""


ROUNDED: tuple[Activations | None, ...] = (None, "int8", "int8-static")
INTEGERS = [replace(kind, group=group, activations=rounded) for kind in KINDS for group in (None, 32) for rounded in ROUNDED]


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_a_description_comes_back_as_the_same_formats(fmt: Integer) -> None:
    formats = {"a": fmt, "b": DENSE, "c": fmt}
    config = to_quantization_config(formats)
    assert config is not None
    assert from_quantization_config(config, formats, ()) == formats
    assert to_quantization_config({"a": DENSE}) is None
    with pytest.raises(ConfigError, match="FP8 layers can't be saved in one checkpoint with layers in another"):
        to_quantization_config({"a": fmt, "b": Fp8Block()})


@given(st.dictionaries(st.text("ab.", min_size=1, max_size=6), st.sampled_from([DENSE, *INTEGERS]), min_size=1))
def test_any_mixture_comes_back_and_gives_each_layer_one_scheme_in_compressed_tensors(formats: dict[str, Format]) -> None:
    config = to_quantization_config(formats)
    if config is None:
        assert set(formats.values()) == {DENSE}
        return
    assert from_quantization_config(config, formats, ()) == formats
    theirs = QuantizationConfig.model_validate(config)
    for name, fmt in formats.items():
        found = [scheme for scheme in theirs.config_groups.values() if match_targets(name, torch.nn.Linear(1, 1), scheme.targets)]
        found = [] if is_match(name, torch.nn.Linear(1, 1), theirs.ignore or ()) else found
        assert len(found) == (fmt != DENSE)
        for scheme in found:
            assert isinstance(fmt, Integer)
            assert (scheme.weights.num_bits, scheme.weights.symmetric, scheme.weights.group_size) == (fmt.bits, fmt.symmetric, fmt.group)
            seen = scheme.input_activations
            assert (seen is None, seen is not None and seen.dynamic) == (fmt.activations is None, fmt.activations == "int8")
            assert (scheme.format or infer_module_format(torch.nn.Linear, scheme)) == fmt.packing


def test_a_name_comes_before_a_pattern_and_that_before_the_class() -> None:
    config: Any = to_quantization_config({"a.q": Integer(4), "a.k": Integer(8), "a.v": Integer(8, 32), "a.o": DENSE})
    targets = {4: ["Linear"], None: ["re:a[.][kv]"], 32: ["a.v"]}
    for group in config["config_groups"].values():
        weights = group["weights"]
        group["targets"] = targets[4 if weights["num_bits"] == 4 else weights["group_size"]]
    read = from_quantization_config(config, ["a.q", "a.k", "a.v", "a.o"], ())
    assert read == {"a.q": Integer(4), "a.k": Integer(8), "a.v": Integer(8, 32), "a.o": DENSE}


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*"], ["a"]], ids=str)
def test_two_groups_that_mean_one_layer_alike_are_refused(targets: list[str]) -> None:
    config: Any = to_quantization_config({"a": Integer(4), "b": Integer(8)})
    for group in config["config_groups"].values():
        group["targets"] = targets
    with pytest.raises(BadCheckpoint, match="group_0 and group_1 both target a"):
        from_quantization_config(config, ["a", "b"], ())


def test_a_pattern_means_what_begins_with_it() -> None:
    config: Any = to_quantization_config({"x.mlp.up": Integer(8), "y.mlp": Integer(8)})
    config["config_groups"]["group_0"]["targets"] = ["re:x[.]mlp"]
    assert from_quantization_config(config, ["x.mlp.up", "y.x.mlp"], ()) == {"x.mlp.up": Integer(8), "y.x.mlp": DENSE}


def test_what_no_group_targets_is_dense() -> None:
    config: Any = to_quantization_config({"x.self_attn.q": Integer(8), "x.mlp.up": Integer(8)})
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    assert from_quantization_config(config, ["x.self_attn.q", "x.mlp.up"], ()) == {"x.self_attn.q": Integer(8), "x.mlp.up": DENSE}


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_compressed_tensors_reads_our_description_and_we_read_its_own(fmt: Integer) -> None:
    config = to_quantization_config({"a": fmt, "b": DENSE})
    theirs = QuantizationConfig.model_validate(config)
    (scheme,) = theirs.config_groups.values()
    assert (scheme.format or infer_module_format(torch.nn.Linear, scheme)) == fmt.packing
    assert (scheme.weights.num_bits, scheme.weights.symmetric, scheme.weights.group_size) == (fmt.bits, fmt.symmetric, fmt.group)
    assert (scheme.input_activations is None) == (fmt.activations is None)
    written = theirs.model_dump(mode="json") | {"format": fmt.packing, "sparsity_config": {}, "transform_config": {}, "version": "0.20.0"}
    assert from_quantization_config(written, ["a", "b"], ()) == {"a": fmt, "b": DENSE}


def test_what_was_written_for_int8_is_written_still() -> None:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    assert to_quantization_config({"a": Integer(8, 32), "b": DENSE}) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["b"],
    }


def test_a_compressed_head_is_named_beside_the_class() -> None:
    """In vLLM it is no "Linear": tests/compress/test_in_vllm.py."""
    formats = {"a": Integer(4, 32), "lm_head": Integer(4, 32), "b": DENSE}
    config: Any = to_quantization_config(formats)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert from_quantization_config(config, list(formats), ()) == formats
    config = to_quantization_config(formats | {"lm_head": DENSE})
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_patterns_in_ignore_are_read() -> None:
    config = to_quantization_config({"a": Integer(8)}) or {}
    config["ignore"] = ["re:.*down_proj", "lm_head"]
    read = from_quantization_config(config, ["layer.down_proj", "layer.up_proj", "lm_head", "xlm_head"], ())
    assert read == {"layer.down_proj": DENSE, "layer.up_proj": Integer(8), "lm_head": DENSE, "xlm_head": Integer(8)}
    config["ignore"] = None
    assert from_quantization_config(config, ["lm_head"], ()) == {"lm_head": Integer(8)}


def _spoilt(path: str, value: Any, fmt: Integer = Integer(8, 32)) -> dict[str, Any]:  # noqa: B008
    config: Any = to_quantization_config({"a": fmt})
    *parts, last = path.split("/")
    here = config
    for part in parts:
        here = here[part]
    here[last] = value
    return dict(config)


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("quant_method", "gptq", 'quantization by "gptq"'),
        ("format", "marlin-24", "format 'marlin-24'"),
        ("format", "naive-quantized", "format 'naive-quantized'"),
        ("quantization_status", "frozen", "quantization_status"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("transform_config", {"config_groups": {"u": 1}}, "transform_config"),
        ("config_groups", {}, "0 config_groups"),
        (f"{GROUP}/targets", ["Linear", "Embedding"], 'group_0: targets "Embedding"'),
        (f"{GROUP}/input_activations", {"num_bits": 4}, "input_activations"),
        (f"{GROUP}/weights/num_bits", 2, "num_bits 2"),
        (f"{GROUP}/output_activations", {"num_bits": 8}, "output_activations"),
        (f"{GROUP}/weights/type", "float", "type 'float'"),
        (f"{GROUP}/weights/symmetric", False, "symmetric False"),
        (f"{GROUP}/weights/strategy", "tensor", "strategy 'tensor'"),
        (f"{GROUP}/weights/actorder", "group", "actorder 'group'"),
    ],
)
def test_schemes_that_we_do_not_read_are_named(path: str, value: Any, told: str) -> None:
    with pytest.raises(UnsupportedModel, match="supported: integer weights by compressed-tensors") as caught:
        from_quantization_config(_spoilt(path, value), ["a"], ())
    assert told in str(caught.value)


A8 = f"{GROUP}/input_activations"


@pytest.mark.parametrize(
    ("fmt", "path", "value", "told"),
    [
        (Integer(8, packing="int-quantized"), f"{GROUP}/weights/num_bits", 4, "num_bits 4"),
        (Integer(8, packing="int-quantized"), f"{GROUP}/weights/symmetric", False, "symmetric False"),
        (Integer(4), f"{GROUP}/format", "int-quantized", "num_bits 4"),
        (Integer(8, activations="int8"), f"{A8}/num_bits", 4, "input_activations: num_bits 4"),
        (Integer(8, activations="int8"), f"{A8}/type", "float", "input_activations: type 'float'"),
        (Integer(8, activations="int8"), f"{A8}/symmetric", False, "input_activations: symmetric False"),
        (Integer(8, activations="int8"), f"{A8}/dynamic", False, "input_activations: strategy 'token'"),
        (Integer(8, activations="int8-static"), f"{A8}/dynamic", True, "input_activations: strategy 'tensor'"),
        (Integer(8, activations="int8-static"), f"{A8}/strategy", "channel", "input_activations: strategy 'channel'"),
        (Integer(8, activations="int8"), f"{A8}/dynamic", "local", "input_activations: dynamic 'local'"),
        (Integer(8, activations="int8"), f"{A8}/strategy", "tensor", "input_activations: strategy 'tensor'"),
        (Integer(8, activations="int8"), f"{A8}/strategy", None, "input_activations: strategy None"),
    ],
)
def test_parts_that_do_not_go_together_are_named(fmt: Integer, path: str, value: Any, told: str) -> None:
    with pytest.raises(UnsupportedModel, match="supported: integer weights by compressed-tensors") as caught:
        from_quantization_config(_spoilt(path, value, fmt), ["a"], ())
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (A8, [8]),
        (A8, "int8"),
        (f"{GROUP}/weights/group_size", True),
        ("config_groups", None),
        ("config_groups", [1]),
        (GROUP, {}),
        (f"{GROUP}/weights", None),
        (f"{GROUP}/weights", {"num_bits": 8}),
        (f"{GROUP}/weights/group_size", "all"),
        (f"{GROUP}/weights/group_size", 0),
        ("ignore", 3),
        ("ignore", ["re:("]),
    ],
)
def test_a_broken_description_is_refused(path: str, value: Any) -> None:
    with pytest.raises(BadCheckpoint, match="quantization_config"):
        from_quantization_config(_spoilt(path, value), ["a"], ())


def test_a_description_that_is_no_table_is_refused() -> None:
    for broken in ([], "int8", 8):
        with pytest.raises(BadCheckpoint, match="quantization_config"):
            from_quantization_config(broken, ["a"], ())


# -- FP8 ---------------------------------------------------------------------------------------------------------


def test_layers_are_fp8_where_their_scales_are_stored() -> None:
    read = from_quantization_config(DEEPSEEK, ["a", "b", "lm_head"], {"a.weight", "a.weight_scale_inv", "b.weight", "xb.weight_scale_inv"})
    assert read == {"a": Fp8Block((128, 128)), "b": DENSE, "lm_head": DENSE}


@pytest.mark.parametrize("extra", [{"modules_to_not_convert": ["b"]}, {"ignored_layers": ["b"]}, {"modules_to_not_convert": None}])
def test_lists_of_what_was_left_alone_are_let_be(extra: dict[str, Any]) -> None:
    assert from_quantization_config(DEEPSEEK | extra, ["a", "b"], {"a.weight_scale_inv"}) == {"a": Fp8Block(), "b": DENSE}


@pytest.mark.parametrize("fmt", [Fp8Block(), Fp8Block((64, 32)), Fp8Block(power_of_two=True)])
def test_an_fp8_description_comes_back_and_transformers_understands_it(fmt: Fp8Block) -> None:
    formats = {"model.layers.0.mlp.up_proj": fmt, "model.layers.0.mlp.gate": DENSE, "lm_head": DENSE}
    config = to_quantization_config(formats)
    assert config is not None
    assert from_quantization_config(config, formats, {"model.layers.0.mlp.up_proj.weight_scale_inv"}) == formats
    theirs = FineGrainedFP8Config(**config)
    assert list(theirs.weight_block_size) == list(fmt.block)
    assert theirs.scale_fmt == ("ue8m0" if fmt.power_of_two else "float")
    assert {name: should_convert_module(name, theirs.modules_to_not_convert) for name in formats} == {
        name: item != DENSE for name, item in formats.items()
    }


def test_deepseeks_description_is_written_back_with_what_it_leaves_out() -> None:
    assert to_quantization_config({"a": Fp8Block(), "lm_head": DENSE}) == DEEPSEEK | {"modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"scale_fmt": "e8m0"}, "scale_fmt 'e8m0'"),
        ({"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert"),
        ({"weight_block_size": None}, "no weight_block_size"),
    ],
)
def test_fp8_that_we_do_not_read_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedModel, match="supported: FP8") as caught:
        from_quantization_config(DEEPSEEK | change, ["a"], ())
    assert told in str(caught.value)


@pytest.mark.parametrize("block", [128, [], [128], [128, 0], [128, -1], [128, True], [128, 1.5], ["128", 128], [1, 2, 3], {"a": 1}, "128"])
def test_a_block_that_is_none_is_refused(block: Any) -> None:
    with pytest.raises(BadCheckpoint, match="weight_block_size"):
        from_quantization_config(DEEPSEEK | {"weight_block_size": block}, ["a"], ())
