"""The format that rounds in training: it is the stored integers to the bit, and its gradients are those of the papers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES
from torch import Tensor
from toys import Theirs, agree, logits_of, prompt, written_by_transformers

from lineshaft.base.errors import ConfigError
from lineshaft.compress import qat
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.qat import FakeInteger, clipped
from lineshaft.compress.stage import compress
from lineshaft.model.attend import LatentQuery, PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.train import optimiser as adamw
from lineshaft.train.optimiser import OptimiserConfig

SOURCES = Path(__file__).parents[2] / "src" / "lineshaft"
FORMATS = [
    Integer(8),
    Integer(8, 8),
    Integer(8, activations="int8", packing="int-quantized"),
    Integer(8, 8, activations="int8", packing="int-quantized"),
    Integer(4),
    Integer(4, 8),
    Integer(4, activations="int8"),
    Integer(4, 8, activations="int8"),
    Integer(4, symmetric=False),
    Integer(4, 8, symmetric=False),
    Integer(4, 8, symmetric=False, activations="int8"),
]
INPUTS = 24


def drawn(seed: int, *shape: int) -> Tensor:
    """Heavy tails, so that ranges clip something."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, shape)).float()


def moved(fmt: FakeInteger, weight_OI: Tensor, seed: int) -> dict[str, Tensor]:
    """Its tensors after some training: everything is where no beginning puts it."""
    tensors = {name: tensor.detach().clone() for name, tensor in fmt.encode(weight_OI).items()}
    for place, name in enumerate(tensors):
        tensors[name] += 0.1 * drawn(seed + place, *tensors[name].shape)
    return tensors


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@given(seed=st.integers(0, 999), outputs=st.integers(1, 9), clip=st.sampled_from(["minmax", "mse", "cut"]))
@settings(max_examples=15)
def test_what_is_stored_decodes_to_the_bits_that_were_trained(fmt: Integer, seed: int, outputs: int, clip: str) -> None:
    fake = FakeInteger(fmt, clip)
    tensors = moved(fake, drawn(seed, outputs, INPUTS), seed)
    stored = fake.stored(tensors)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in fmt.empty(outputs, INPUTS).items()
    }
    assert torch.equal(fake.decode(tensors, torch.float32), fmt.decode(stored, torch.float32))
    x_TI, bias_O = drawn(seed, 5, INPUTS), drawn(seed, outputs)
    ours, theirs = fake.matmul(x_TI, tensors, bias_O), fmt.matmul(x_TI, stored, bias_O)
    if fmt.activations is None:
        assert torch.equal(ours, theirs)
    else:  # the same numbers, added up in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_with_minmax_it_begins_as_rounding_to_nearest(fmt: Integer, seed: int) -> None:
    weight_OI = drawn(seed, 5, INPUTS)
    fake = FakeInteger(fmt, "minmax")
    stored = fmt.encode(weight_OI)
    for name, tensor in fake.stored(fake.encode(weight_OI)).items():
        assert torch.equal(tensor, stored[name])


def test_every_scale_that_fp16_has_survives_the_logarithm() -> None:
    every_X = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    fake = FakeInteger(Integer(8))
    tensors = {"weight": torch.zeros(len(every_X), 4), "log_scale": every_X.float().log()}
    assert torch.equal(fake.grid(tensors)[0][:, 0], every_X)


@pytest.mark.parametrize("fmt", [item for item in FORMATS if item.bits == 4], ids=repr)
def test_4_bits_are_16_levels(fmt: Integer) -> None:
    fake = FakeInteger(fmt)
    tensors = moved(fake, torch.randn(6, 96, generator=torch.Generator().manual_seed(1)), 2)
    levels = [len(group.unique()) for group in fake.decode(tensors, torch.float32).reshape(-1, fmt.group or 96)]
    assert max(levels) <= 16
    assert fmt.group is not None or min(levels) > 10  # and they are used


# -- gradients --------------------------------------------------------------------------------------------------


def gradients(fake: FakeInteger, tensors: dict[str, Tensor], grad_OI: Tensor) -> dict[str, Tensor]:
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    fake.decode(tensors, torch.float32).backward(grad_OI)
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize(
    "fmt", [Integer(8, 8), Integer(4), Integer(4, 8), Integer(4, symmetric=False), Integer(4, 8, symmetric=False)], ids=repr
)
@given(seed=st.integers(0, 999))
@settings(max_examples=20)
def test_gradients_are_those_of_pytorchs_own_learnable_quantisation(fmt: Integer, seed: int) -> None:
    """aten's kernel for LSQ, which takes a zero point as well. It rounds before it asks what is clipped, so half steps are left out."""
    fake = FakeInteger(fmt)
    tensors = moved(fake, drawn(seed, 6, INPUTS), seed)
    scale_OG, zero_OG = fake.grid(tensors)
    scale_X1, zero_X1 = scale_OG.float().reshape(-1, 1), zero_OG.float().reshape(-1, 1)
    code_XI = tensors["weight"].view(len(scale_X1), -1) / scale_X1 + zero_X1
    unsure_XI = (code_XI.abs() < 0.51) | ((code_XI - fake.top).abs() < 0.51)
    tensors["weight"] = code_XI.masked_fill(unsure_XI, 5.3).sub(zero_X1).mul(scale_X1).view(6, INPUTS)
    grad_OI = drawn(seed + 7, 6, INPUTS)
    ours = gradients(fake, tensors, grad_OI)
    weight_XI, scale_X, zero_X = (
        item.detach().clone().requires_grad_(True) for item in (tensors["weight"].view(len(scale_X1), -1), scale_X1[:, 0], zero_X1[:, 0])
    )
    width = weight_XI.shape[1]
    balance = (width * (127 if fmt.bits == 8 else 7)) ** -0.5
    out_XI = torch._fake_quantize_learnable_per_channel_affine(weight_XI, scale_X, zero_X, 0, 0, fake.top, balance)
    assert torch.equal(out_XI.detach().view(6, -1), fake.decode(tensors, torch.float32).detach())
    out_XI.backward(grad_OI.view(weight_XI.shape))
    assert weight_XI.grad is not None and scale_X.grad is not None and zero_X.grad is not None
    assert torch.equal(ours["weight"], weight_XI.grad.view(6, -1))
    assert not ours["weight"].all()  # something was clipped
    torch.testing.assert_close(ours["log_scale"], scale_X.grad * scale_X.detach(), rtol=1e-4, atol=1e-5)
    if not fmt.symmetric:
        torch.testing.assert_close(ours["shift"], zero_X.grad * fake.top, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "slope", "through"),
    [
        (0.3, -0.3, 1),
        (-0.4, 0.4, 1),
        (6.4, -0.4, 1),
        (7.0, 7, 0),
        (7.3, 7, 0),
        (99.0, 7, 0),
        (-7.9, -0.1, 1),
        (-8.0, -8, 0),
        (-8.3, -8, 0),
        (-99.0, -8, 0),
    ],
)
def test_one_weight_by_the_papers_equation(steps: float, slope: float, through: int) -> None:
    """LSQ, equation 3: round(v) - v inside the range, its ends outside; and equation 5 for the weight."""
    fake, scale = FakeInteger(Integer(4)), 0.25
    tensors = {"weight": torch.zeros(1, 8), "log_scale": torch.tensor([scale]).log()}
    tensors["weight"][0, 3] = steps * scale
    grad_OI = torch.zeros(1, 8)
    grad_OI[0, 3] = 2.0
    found = gradients(fake, tensors, grad_OI)
    assert found["weight"][0, 3] == 2 * through
    assert found["log_scale"].item() == pytest.approx(2 * slope * scale * (8 * 7) ** -0.5, abs=1e-6)


def test_activations_are_rounded_a_token_at_a_time_and_gradients_go_straight_through() -> None:
    """Dynamic in truth: nothing of another token, and nothing fixed before, is in a token's scale."""
    fake = FakeInteger(Integer(8, activations="int8", packing="int-quantized"))
    tensors = moved(fake, drawn(1, 6, INPUTS), 1)
    x_TI = drawn(2, 4, INPUTS)
    out_TO = fake.matmul(x_TI, tensors, None)
    for token in range(4):
        torch.testing.assert_close(fake.matmul(x_TI[token : token + 1], tensors, None), out_TO[token : token + 1])
    torch.testing.assert_close(fake.matmul(64 * x_TI, tensors, None), 64 * out_TO)
    assert not torch.allclose(out_TO, x_TI @ fake.decode(tensors, torch.float32).T, rtol=1e-4)
    x_TI.requires_grad_(True)
    grad_TO = drawn(3, 4, 6)
    weight_OI = tensors["weight"].requires_grad_(True)
    fake.matmul(x_TI, tensors, None).backward(grad_TO)
    torch.testing.assert_close(x_TI.grad, grad_TO @ fake.decode(tensors, torch.float32).detach())
    codes_TI = (x_TI.detach() / (scale_T1 := x_TI.detach().abs().amax(1, keepdim=True) / 127)).round()
    inside = gradients(fake, {name: tensor.detach().clone() for name, tensor in tensors.items()}, torch.ones(6, INPUTS))["weight"]
    torch.testing.assert_close(weight_OI.grad, grad_TO.T @ (codes_TI * scale_T1) * inside)


# -- ranges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Integer(4), Integer(4, symmetric=False)], ids=repr)
@pytest.mark.parametrize("method", ["mse", "cut", "entropy", "percentile"])
def test_ranges_begin_inside_those_of_rounding_to_nearest_and_hold_zero(fmt: Integer, method: str) -> None:
    grouped_OGI = drawn(4, 40, 2, 64)
    kept_OGI = clipped(grouped_OGI, method, fmt)
    assert (kept_OGI.abs() <= grouped_OGI.abs()).all()
    assert torch.equal(kept_OGI, clipped(4 * grouped_OGI, method, fmt) / 4)
    (before, zero_before), (after, zero_after) = fmt.scale_and_zero(grouped_OGI), fmt.scale_and_zero(kept_OGI)
    assert (after <= before).all()
    assert method not in ("mse", "cut") or (after < before).float().mean() > 0.9
    codes_before, codes_after = (fmt.nearest(torch.zeros(1), *parts) for parts in ((before, zero_before), (after, zero_after)))
    assert torch.equal(codes_before, zero_before)
    assert torch.equal(codes_after, zero_after)


@pytest.mark.parametrize("fmt", [Integer(4), Integer(4, 64), Integer(4, 64, symmetric=False), Integer(4, symmetric=False)], ids=repr)
def test_the_least_squared_error_gives_most_of_what_a_search_in_each_group_would(fmt: Integer) -> None:
    weight_OI = drawn(5, 64, 256)
    grouped_OGI = weight_OI.view(64, fmt.groups(256), -1)
    shares = torch.linspace(0.3, 1, 71).tolist()
    tried_SOG = torch.stack([squared_error(fmt, grouped_OGI, share * grouped_OGI.abs().amax(-1, keepdim=True)) for share in shares])
    fake = FakeInteger(fmt, "mse")
    ours = (fake.decode(fake.encode(weight_OI), torch.float32) - weight_OI).square().sum().item()
    nearest, best = tried_SOG[-1].sum().item(), tried_SOG.amin(0).sum().item()
    assert nearest - ours > 0.25 * (nearest - best)


def squared_error(fmt: Integer, grouped_OGI: Tensor, clip_OG1: Tensor) -> Tensor:
    scale_OG, zero_OG = fmt.scale_and_zero(torch.minimum(torch.maximum(grouped_OGI, -clip_OG1), clip_OG1))
    scale_OG1, zero_OG1 = scale_OG.float()[:, :, None], zero_OG.float()[:, :, None]
    return ((fmt.nearest(grouped_OGI, scale_OG1, zero_OG1).float() - zero_OG1) * scale_OG1 - grouped_OGI).square().sum(-1)


@pytest.mark.parametrize("fmt", [Integer(4, 8), Integer(4, 8, symmetric=False), Integer(8)], ids=repr)
def test_a_layer_of_zeros_and_a_group_of_zeros_stay_zero(fmt: Integer) -> None:
    for weight_OI in (torch.zeros(3, INPUTS), torch.cat([torch.zeros(3, 8), drawn(6, 3, 16)], 1)):
        fake = FakeInteger(fmt)
        tensors = fake.encode(weight_OI)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert not fake.decode(tensors, torch.float32)[:, :8].any()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match="a weight is not a number or infinite"):
        FakeInteger(Integer(4)).encode(torch.full((2, 8), torch.inf))


# -- models -----------------------------------------------------------------------------------------------------

OWN_LAYERS = {"llama-biased", "llama-tied", "qwen3", "qwen2-moe", "deepseek-v3-wide-values", "deepseek-v3-added", "deepseek-v32"}
EVERY_SHAPE = pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OWN_LAYERS)) for name in SHAPES])
"""Slow are those that differ by where attention looks, and those of which each linear layer is in one of the others."""
MIXED = {"policy": {"*.o_proj": "int4-8", "*.up_proj": "int4-8-zeros", "lm_head": "int8-4"}}
"""Of all inputs here only some have groups of 8, and layers of 20 and 12 inputs no words of eight 4-bit codes."""


def model_of(name: str) -> Decoder:
    model = Decoder(SHAPES[name])
    model.initialise(1)
    return model


def logits(model: Decoder) -> Tensor:
    tokens_T = torch.arange(20) * 7 % 61
    return model(tokens_T, torch.cat([torch.arange(11), torch.arange(9)]), PackedCausal([0, 11], 20))


@EVERY_SHAPE
@pytest.mark.parametrize("wanted", [{"group": 4, "skip": []}, MIXED], ids=["groups", "mixed"])
def test_a_converted_model_computes_what_the_trained_one_did(name: str, wanted: dict[str, Any]) -> None:
    model = model_of(name)
    dense = logits(model)
    qat.begin(model, CompressConfig.model_validate(wanted))
    shake(model)
    before = logits(model)
    qat.finish(model)
    after = logits(model)
    assert not torch.equal(before, dense) and torch.equal(before, after)


def shake(model: Decoder) -> None:
    """As if a step had been made."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith(("log_scale", "shift")):
            parameter.data += 0.05 * drawn(number, *parameter.shape)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "deepseek-v3"])
def test_with_rounded_activations_it_differs_by_the_order_of_sums(name: str) -> None:
    model = model_of(name)
    qat.begin(model, CompressConfig(activations="int8"))
    shake(model)
    before = logits(model)
    qat.finish(model)
    assert {linear.format for linear in model.linears().values()} - {DENSE} == {Integer(8, None, True, "int8", "int-quantized")}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@EVERY_SHAPE
def test_every_linear_layer_is_rounded_and_nothing_else(name: str) -> None:
    """Attention too, and experts of every kind; by design no embedding, norm, router or gate."""
    model, twin = model_of(name), model_of(name)
    layers = qat.begin(model, CompressConfig())
    assert layers == compress(twin, CompressConfig()) == sorted(model.linears().keys() - {"lm_head"})
    assert any("self_attn" in layer for layer in layers)
    assert SHAPES[name].moe is None or {".experts." in layer for layer in layers} == {True, False}
    rounded = {f"{layer}.{part}" for layer in layers for part in ("weight", "log_scale")}
    assert rounded <= dict(model.named_parameters()).keys()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in rounded:
            assert torch.equal(parameter, dict(twin.named_parameters())[parameter_name])
    assert type(model.model.embed_tokens.weight) is torch.nn.Parameter and not isinstance(model.model.embed_tokens, Linear)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-moe", "deepseek-v3-mtp", "deepseek-v3-added"])
def test_every_rounded_layer_has_gradients_of_weight_and_range(name: str) -> None:
    model = model_of(name)
    for gate in (parameter for name, parameter in model.named_parameters() if name.endswith(".gate.weight")):
        torch.nn.init.normal_(gate, generator=torch.Generator().manual_seed(3))  # an added expert begins silent
    layers = qat.begin(model, CompressConfig(format="int4", policy={"*": "int8", "*.o_proj": "int4-8-zeros"}, skip=[]))
    tokens_T, positions_T, attend = torch.arange(40) % 61, torch.arange(40), PackedCausal([0], 40)
    hidden = model.hidden(tokens_T, positions_T, attend)
    total = model.logits(hidden).square().sum()
    for depth in range(SHAPES[name].num_nextn_predict_layers):
        hidden = model.draft(depth, hidden, tokens_T, positions_T, attend)
        total = total + model.logits(hidden).square().sum()
    total.backward()
    parameters = dict(model.named_parameters())
    for layer in layers:
        for part in model.linears()[layer].format.tensor_names:
            grad = parameters[f"{layer}.{part}"].grad
            assert grad is not None, (layer, part)
            assert grad.any() or part == "shift", (layer, part)  # which has none where nothing is clipped


def test_latent_attention_absorbs_the_rounded_weight() -> None:
    model = model_of("deepseek-v3")
    qat.begin(model, CompressConfig())
    up = model.linears()["model.layers.0.self_attn.kv_b_proj"]
    q_THN, latent_SC = drawn(1, 3, 4, 10), drawn(2, 5, 12)
    query = LatentQuery(q_THN, drawn(3, 3, 4, 6), up)
    keys_SHN, values_SHV = query.expand(latent_SC)
    torch.testing.assert_close(torch.einsum("thc,sc->ths", query.absorbed(), latent_SC), torch.einsum("thn,shn->ths", q_THN, keys_SHN))
    torch.testing.assert_close(query.values(latent_SC[:3, None].expand(-1, 4, -1)), values_SHV[:3])


def test_ranges_do_not_decay_with_the_weights() -> None:
    model = model_of("deepseek-v3")
    qat.begin(model, CompressConfig(format="int8"))
    decays = {
        id(parameter): group["weight_decay"]
        for group in adamw.build(model, OptimiserConfig()).param_groups
        for parameter in group["params"]
    }
    found = {name.rsplit(".", 1)[-1]: decays[id(parameter)] for name, parameter in model.named_parameters() if "proj." in name}
    assert found == {"weight": 0.1, "log_scale": 0.0}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_gives_the_logits_that_were_trained(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(written_by_transformers(name, tmp_path / "hf").folder)
    qat.begin(model, CompressConfig(format="int4", policy={"*.self_attn.*": "int4-8"}))
    shake(model)
    ours = logits_of(model, prompt(20))
    qat.finish(model)
    save_checkpoint(model, tmp_path / "out", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig())
    assert agree(ours, Theirs(tmp_path / "out", theirs.eval()).logits(prompt(20)))


def test_a_model_in_training_is_no_checkpoint_yet() -> None:
    assert FakeInteger(Integer(4)).describe() == "int4, one scale a channel, in training"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"skip": ["lm_haed"]}, r'qat: skip: "lm_haed" is no layer of this model; its layers are named like model.layers.0'),
        ({"policy": {"*.atn.*": "int4"}}, r'qat: policy: "\*.atn.\*" is no layer'),
        ({"skip": ["*"]}, "qat: skip and policy leave no layer to compress"),
        ({"group": 7}, r"qat: model.layers.0.self_attn.q_proj: int8: 32 inputs are not a multiple of 7; .* or add it to skip"),
    ],
)
def test_what_can_not_be_done_is_named(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        qat.begin(model_of("llama"), CompressConfig.model_validate(config))


def test_what_is_compressed_already_is_refused() -> None:
    model = model_of("llama")
    compress(model, CompressConfig(skip=["lm_head", "*.down_proj"]))
    with pytest.raises(ConfigError, match=r"qat: model.layers.0.self_attn.q_proj is stored as int8, one scale a channel already"):
        qat.begin(model, CompressConfig())


def test_nothing_here_leans_on_what_pytorch_is_going_to_delete() -> None:
    """torch.quantization and torch.ao.quantization are deprecated (PyTorch 2.10 and later)."""
    pattern = re.compile(r"torch\.(ao|quantization)|from torch import (ao|quantization)")
    assert [path.name for path in SOURCES.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))] == []
