"""ONNX files in ONNX Runtime: its logits are ours, its weights are the checkpoint's, and codes stay codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_toys import FORMS
from toys import Theirs, logits_of, prompt

from lineshaft.base.errors import BadCheckpoint, ConfigError, MissingExtra, UnsupportedModel
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.export import onnx as onnx_files
from lineshaft.compress.export import onnx_graph
from lineshaft.compress.export.exporting import export
from lineshaft.compress.stage import compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.linear import Linear

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'lineshaft[onnx]'")
runtime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'lineshaft[onnx]'")

Source = Callable[..., Path]
DENSE = [
    *("llama", "llama-one-key-head", "llama-biased", "llama-tied", "llama-wide-heads", "llama-linear", "llama-llama3", "llama-yarn"),
    *("llama-yarn-other-betas", "mistral", "mistral-window", "mistral-window-of-one", "mistral-window-linear"),
    *("qwen2", "qwen2-tied", "qwen2-window-by-layer-types", "qwen2-yarn", "qwen3", "qwen3-biased", "qwen3-window-in-upper-layers"),
]


def far(folder: Path, path: Path, tokens: list[int]) -> float:
    """How far logits lie from ours at most, as a part of the largest."""
    ours = logits_of(load_checkpoint(folder, dtype=torch.float32, dequantise=True), tokens).numpy()
    return float(np.abs(onnx_files.run(path, np.array(tokens)) - ours).max() / np.abs(ours).max())


@pytest.mark.parametrize("name", DENSE)
def test_logits_are_ours_for_texts_of_any_length(name: str, source: Source, tmp_path: Path) -> None:
    done = export(source(name), tmp_path / "m.onnx", "onnx")
    assert done.seen["largest_logit_error"] < 5e-6
    assert abs(done.seen["golden_nats"]) < 1e-6
    assert max(far(source(name), done.path, prompt(length)) for length in (1, 2, 7, 40)) < 5e-6
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_logits_are_those_of_transformers(source: Source, tmp_path: Path) -> None:
    import transformers

    export(source("qwen3"), tmp_path / "m.onnx", "onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(source("qwen3")).eval()
    other = Theirs(source("qwen3"), model).logits(prompt(30)).numpy()
    assert np.allclose(onnx_files.run(tmp_path / "m.onnx", np.array(prompt(30))), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [*FORMS, "bf16"])
@pytest.mark.parametrize("name", ["wide-llama", "wide-qwen3"])
def test_codes_stay_codes_and_give_our_logits(name: str, form: str, source: Source, tmp_path: Path) -> None:
    done = export(source(name, form), tmp_path / "m.onnx", "onnx")
    assert far(source(name, form), done.path, prompt(40)) < 5e-6
    kind = {"Q8_0": "UINT8", "Q4_0": "UINT4", "Q4_1": "UINT4"}.get(FORMS.get(form, ({}, ""))[1])
    assert kind is None or done.kinds[kind] == 2 * 14  # codes and zeros of each layer


def test_formats_may_differ_by_layer_and_groups_be_of_any_size(source: Source, tmp_path: Path) -> None:
    model = load_checkpoint(source("broad-llama"))
    policy = {"*.self_attn.*": "int4-16", "*.mlp.*": "int8-128", "*.down_proj": "int4-64-zeros", "*.0.*": "dense", "lm_head": "int8"}
    compress(model, CompressConfig(policy=policy))
    save_checkpoint(model, tmp_path / "hf", source("broad-llama"))
    export(tmp_path / "hf", tmp_path / "m.onnx", "onnx")
    assert far(tmp_path / "hf", tmp_path / "m.onnx", prompt(20)) < 5e-6


def test_dynamic_int8_is_smaller_and_near(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = export(source("broad-llama"), tmp_path / "m.onnx", "onnx")
    done = export(source("broad-llama"), tmp_path / "d.onnx", "onnx", dynamic_int8=True)
    assert done.bytes < 0.4 * plain.bytes
    assert done.kinds["INT8"] == 2 * 15
    assert 0 < done.seen["golden_nats"] < 0.02
    assert "pre-processing" not in capsys.readouterr().err


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_same_checkpoint_gives_the_same_bytes(dynamic: bool, source: Source, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(source("wide-llama"), tmp_path / name, "onnx", dynamic_int8=dynamic)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("name", "told"), [("mixtral", "experts"), ("deepseek", "latent attention"), ("llama-dynamic", "dynamic")])
def test_what_is_no_dense_decoder_is_refused_by_name(name: str, told: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        export(source(name), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_other_format_are_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        export(source("llama"), tmp_path / "m", "onnx", tokenizer="none")
    with pytest.raises(ConfigError, match="dynamic_int8"):
        export(source("llama"), tmp_path / "m", "gguf", tokenizer="none", dynamic_int8=True)
    with pytest.raises(ConfigError, match="codes already"):
        export(source("wide-llama", "int8"), tmp_path / "m", "onnx", dynamic_int8=True)


def test_a_model_that_no_protobuf_holds_is_refused(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "MOST_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"weights take \d+ bytes"):
        export(source("llama"), tmp_path / "m.onnx", "onnx")


def test_how_large_it_will_be_is_known_before(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("", "int8", "int4-32-zeros"):
        done = export(source("broad-llama") if not form else source("wide-llama", form), tmp_path / "m.onnx", "onnx")
        model = load_checkpoint(source("broad-llama") if not form else source("wide-llama", form))
        told = sum(map(onnx_files._bytes, model.linears().values())) + 4 * model.model.embed_tokens.weight.numel()
        assert 0.8 * done.bytes - 20_000 < told < done.bytes


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(package: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed: .*lineshaft\[onnx\]"):
        export(source("llama"), tmp_path / "m.onnx", "onnx")


# -- the proof


def test_a_weight_that_differs_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = onnx_graph._weight

    def bad(graph: Any, linear: Linear, name: str) -> str:
        other = Linear(linear.in_features, linear.out_features)
        other.hold(linear.format, {part: tensor.clone() for part, tensor in linear.tensors().items()})
        if name.endswith("1.mlp.up_proj"):
            tensor = next(iter(other.tensors().values()))
            with torch.no_grad():
                tensor.view(torch.uint8).flatten()[5] ^= 1
        return weight(graph, other, name)

    monkeypatch.setattr(onnx_graph, "_weight", bad)
    for form in ("", "int8", "int4-32-zeros"):
        with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj"):
            export(source("wide-llama", form), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_not_kept(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = onnx_graph._turned
    monkeypatch.setattr(onnx_graph, "_turned", lambda graph, x, turn, width: turned(graph, x, turn[::-1], width))
    with pytest.raises(BadCheckpoint, match="logits differ"):
        export(source("wide-llama"), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
