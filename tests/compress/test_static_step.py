"""The step `static`: one scale for a layer's activations, found by calibration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_line import ROWS, Line, line
from filled import filled
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from shapes import SHAPES
from test_calibrated import FAMILIES, logits, with_outliers
from torch import Tensor, nn

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.compress.calibrate.rows import calibration_rows
from lineshaft.compress.config import CompressConfig, StaticConfig
from lineshaft.compress.layers import routed
from lineshaft.engine.packing import packed_copy
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops import table
from lineshaft.ops.formats import Integer


def static_layers(model: Decoder) -> set[str]:
    formats = {name: linear.format for name, linear in model.linears().items()}
    return {name for name, fmt in formats.items() if isinstance(fmt, Integer) and fmt.activations == "int8-static"}


RANGES = {"llama-biased": "mse", "qwen2-moe": "mse"}
"""The search for the least squared error takes most of the time, and sees numbers alone: two families have it, with an expert's too."""


@pytest.mark.parametrize("shape", FAMILIES)
def test_every_family_is_rounded_and_proven(shape: str, tmp_path: Path) -> None:
    made = line(tmp_path / "store", shape)
    after, before = made.compress("static", **ROWS, range=RANGES.get(shape, "percentile")), logits(made.checkpoint.root)
    model = load_checkpoint(after.root)
    own = {name for name, linear in model.linears().items() if linear is not model.lm_head}
    assert static_layers(model) == own - routed(model)
    assert all("int8 activations" in model.linears()[name].format.describe() for name in own)
    most = 0.5 if shape == "deepseek-v32" else 0.12  # its indexer picks other tokens where two are nearly alike
    assert 0 < (logits(after.root) - before).norm() < most * before.norm()
    assert after.manifest.facts["largest_error_steps"] <= 0.52


def seen_by(model: Decoder, made: Line) -> dict[str, Tensor]:
    """All numbers that came into each layer in whole passes of the model over the calibration text."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(given[0].flatten())

        return before

    for name, linear in model.linears().items():
        linear.register_forward_pre_hook(note(name))
    with torch.no_grad():
        for around in calibration_rows(made.tokens, load(StaticConfig, {"step": "static", **ROWS}), model.config):
            model(around.batch.tokens_T, around.batch.positions_T, around.attend)
    return {name: torch.cat(parts).abs().float() for name, parts in found.items()}


@pytest.mark.parametrize("way", ["minmax", "percentile", "cut"])
def test_a_scale_is_what_the_dense_model_s_activations_give(way: str, tmp_path: Path) -> None:
    """By sorting all of them, instead of a histogram: right to a bin's width, a 2048th of the largest at most."""
    made = line(tmp_path / "store", with_outliers("llama"))
    model = load_checkpoint(made.compress("static", **ROWS, range=way, proof_nats=10.0).root)
    seen = seen_by(load_checkpoint(made.checkpoint.root), made)
    for name in static_layers(model):
        sizes = seen[name].sort().values
        if way == "minmax":
            wanted = sizes[-1].item()
        elif way == "percentile":
            wanted = sizes[min(int(0.9999 * len(sizes)), len(sizes) - 1)].item()
        else:
            clips = torch.linspace(0, sizes[-1].item(), 4096)
            lost = torch.stack([(sizes - clip).clamp(min=0).sum() for clip in clips])
            wanted = clips[int((lost <= 0.001 * sizes.sum()).nonzero()[0])].item()
        got = model.linears()[name].input_scale.item() * 127
        assert got == pytest.approx(wanted, abs=sizes[-1].item() / 1024 if way != "minmax" else 1e-6 * wanted), name


def test_the_kernels_give_the_reference_s_answers(tmp_path: Path) -> None:
    made = line(tmp_path / "store", "llama")
    model = load_checkpoint(made.compress("static", **ROWS, range="percentile").root)
    text = torch.arange(20) % model.config.vocab_size
    with torch.inference_mode(), table.steady():
        plain = model.lm_head(model.model.layers[0].mlp(model.model.embed_tokens(text)))  # type: ignore[misc, union-attr, operator]
        packed = packed_copy(model)
        got = packed.lm_head(packed.model.layers[0].mlp(packed.model.embed_tokens(text)))  # type: ignore[misc, union-attr, operator]
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_smoothing_first_helps_one_scale_most(tmp_path: Path) -> None:
    made = line(tmp_path / "store", with_outliers("llama"))
    before = logits(made.checkpoint.root)
    smoothed = Line(made.store, made.compress("smooth", **ROWS), made.tokens)
    given = {**ROWS, "range": "minmax", "proof_nats": 10.0}
    alone, after = made.compress("static", **given), smoothed.compress("static", **given)
    by_token = made.compress("round", activations="int8", proof_nats=10.0)
    error = {item.id: (logits(item.root) - before).norm().item() for item in (alone, after, by_token)}
    assert error[after.id] < 0.3 * error[alone.id]
    assert error[by_token.id] < error[alone.id]


def test_layers_may_keep_a_scale_a_token_or_weights_in_four_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = line(tmp_path / "store", "qwen3-moe")
    policy = {"*.o_proj": "int8-a8", "*.q_proj": "int4-16-static", "*.k_proj": "dense"}
    model = load_checkpoint(made.compress("static", **ROWS, policy=policy, proof_nats=0.5).root)
    told = {name.rpartition(".")[2]: linear.format.describe() for name, linear in model.linears().items() if "experts" not in name}
    assert told["o_proj"] == "int8, one scale a channel, int8 activations" and told["k_proj"] == "dense"
    assert told["q_proj"] == "int4, one scale a group of 16, int8 activations by one scale"
    assert {model.linears()[name].format.describe() for name in routed(model)} == {"int8, one scale a channel, int8 activations"}
    assert f"the {len(routed(model))} layers of routed experts keep one scale a token" in capsys.readouterr().err


def test_a_layer_that_no_token_comes_to_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only experts can be passed by: were they to have one scale, there would be none for them."""
    model = filled(SHAPES["deepseek-v3-added"], spread=0.15)
    for router in model.routers():
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias[5] = -100.0
    made = line(tmp_path / "store", model)
    given = {**ROWS, "range": "percentile"}
    assert made.compress("static", **given).manifest.facts["layers_without_tokens"]
    monkeypatch.setattr("lineshaft.compress.calibrated.routed", lambda model: frozenset())
    with pytest.raises(ConfigError, match=r"experts\.5\.\S+: no calibration token came to it, so its activations have no range"):
        made.compress("static", **(given | {"sequences": 5}))


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (CompressConfig, {"policy": {"*": "int8-static"}}, "takes calibration: only the step `static` makes it"),
        (StaticConfig, {"policy": {"*": "int8-static-a8"}}, "is none: formats are"),
        (StaticConfig, {"policy": {"*": "fp8-static"}}, "is none: formats are"),
        (StaticConfig, {"range": "widest"}, "range"),
        (StaticConfig, {"activations": None}, "activations"),
    ],
)
def test_what_can_not_be_is_refused(config: type[Any], given: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=told):
        load(config, given)


def test_a_checkpoint_whose_scale_can_be_none_is_refused_with_the_layer_s_name(tmp_path: Path) -> None:
    made = line(tmp_path / "store", "llama").compress("static", **ROWS, range="percentile")
    shutil.copytree(made.root, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.input_scale"].zero_()
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"copy: model\.layers\.1\.mlp\.up_proj: input_scale 0\.0 is no scale"):
        load_checkpoint(tmp_path / "copy")
