"""Checkpoints of integer weights: what is saved loads to the bit, scales of others keep their dtype, what does not fit is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import Theirs, agree, logits_of, prompt

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from integer_cases import KINDS

Get = Callable[[str], Theirs]
Tensors = dict[str, torch.Tensor]
ALL = [replace(kind, group=group, activations=rounded) for kind in KINDS for group in (None, 8) for rounded in (None, "int8")]
UP = "model.layers.0.mlp.up_proj"


def recoded(theirs: Get, name: str, fmt: Integer) -> tuple[Decoder, Path]:
    """The toy with every layer in this format whose inputs it fits, and where it came from."""
    model = load_checkpoint(theirs(name).folder)
    for layer, linear in model.linears().items():
        if layer != "lm_head" and linear.in_features % 8 == 0:
            linear.recode(fmt)
    return model, theirs(name).folder


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("name", ["llama-biased", "deepseek"])
def test_they_come_back_as_they_were(name: str, fmt: Integer, theirs: Get, tmp_path: Path) -> None:
    model, source = recoded(theirs, name, fmt)
    save_checkpoint(model, tmp_path / "out", source)
    again = load_checkpoint(tmp_path / "out")
    assert {linear.format for linear in again.linears().values()} == {fmt, DENSE}
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits_of(again, prompt(20)), logits_of(model, prompt(20)))
    assert quantised_share_of_fp32(again) == quantised_share_of_fp32(model)


@pytest.mark.parametrize("fmt", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_they_are_the_model_that_they_were(dtype: torch.dtype, fmt: Integer, theirs: Get, tmp_path: Path) -> None:
    model, source = recoded(theirs, "llama", fmt)
    save_checkpoint(model, tmp_path / "out", source)
    kept, decoded = load_checkpoint(tmp_path / "out", dtype=dtype), load_checkpoint(tmp_path / "out", dtype=dtype, dequantise=True)
    assert {linear.format for linear in decoded.linears().values()} == {DENSE}
    assert {parameter.dtype for parameter in decoded.parameters()} == {dtype}
    assert agree(logits_of(kept, prompt(20)), logits_of(decoded, prompt(20)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_scales_of_others_are_taken_as_they_are(fmt: Integer, dtype: torch.dtype, theirs: Get, tmp_path: Path) -> None:
    model, source = recoded(theirs, "llama", fmt)
    save_checkpoint(model, tmp_path / "out", source)
    rewrite(tmp_path / "out", lambda t: t.update({name: item.to(dtype) for name, item in t.items() if name.endswith("scale")}))
    again = load_checkpoint(tmp_path / "out", dtype=torch.float32)
    assert again.linears()[UP].weight_scale.dtype == dtype
    for name, linear in model.linears().items():
        if linear.format != DENSE:
            linear.weight_scale = linear.weight_scale.to(dtype)
        assert torch.equal(again.linears()[name].dense_weight(torch.float32), linear.dense_weight(torch.float32))
    assert torch.equal(logits_of(again, prompt(9)), logits_of(model, prompt(9)))


@pytest.mark.parametrize(
    ("fmt", "change", "told"),
    [
        (
            Integer(4),
            lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, 1:]}),
            r"up_proj.weight_packed has shape",
        ),
        (
            Integer(4, 8),
            lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:, 1:]}),
            r"up_proj.weight_scale has shape",
        ),
        (Integer(4), lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].long()}), "is stored as torch.int64"),
        (Integer(4, symmetric=False), lambda t: t.pop(f"{UP}.weight_zero_point"), "1 tensor is missing: .*up_proj.weight_zero_point"),
        (Integer(4), lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(5, 1)}), "not part of this model: .*weight_zero_point"),
        (Integer(4, symmetric=False), lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(40, 1).int()}), r"\[40, 1\].*\[5, 1\]"),
        (KINDS[1], lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), "up_proj.weight is stored as torch.float32"),
        (KINDS[1], lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].int()}), "weight_scale is stored as torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    fmt: Integer, change: Callable[[Tensors], object], told: str, theirs: Get, tmp_path: Path
) -> None:
    model, source = recoded(theirs, "llama", fmt)
    save_checkpoint(model, tmp_path / "out", source)
    rewrite(tmp_path / "out", change)
    with pytest.raises(BadCheckpoint, match=told):
        load_checkpoint(tmp_path / "out")


def test_without_a_description_the_question_is_whether_it_is_complete(theirs: Get, tmp_path: Path) -> None:
    model, source = recoded(theirs, "llama", KINDS[1])
    save_checkpoint(model, tmp_path / "out", source)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadCheckpoint, match=r"weight_scale.*quantization_config in config.json describes them"):
        load_checkpoint(tmp_path / "out")


def test_groups_that_do_not_divide_name_the_layer(theirs: Get, tmp_path: Path) -> None:
    model, source = recoded(theirs, "llama", Integer(4, 8))
    save_checkpoint(model, tmp_path / "out", source)
    text = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(text.replace('"group_size": 8', '"group_size": 24'))
    with pytest.raises(BadCheckpoint, match=r"model.layers.0.self_attn.q_proj: int4: 32 inputs are not a multiple of 24"):
        load_checkpoint(tmp_path / "out")
