"""What is not the model that went in never becomes an artifact, whoever spoilt it: the writer, a name, the encoder, the product."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import with_prediction_layers, written_by_transformers

from lineshaft.base.errors import BadCheckpoint
from lineshaft.base.store import Artifact, Store
from lineshaft.compress import stage
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.stage import COMPRESS
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.ops import formats

Make = Callable[..., Artifact]
Tensors = dict[str, Tensor]
CONFIGS = {
    "int8": CompressConfig(),
    "int8 with activations": CompressConfig(activations="int8"),
    "int4": CompressConfig(format="int4", group=8, skip=["lm_head", "*.q_b_proj", "*.kv_b_proj"]),
    "int4 with zero points": CompressConfig(format="int4", group=8, symmetric=False, skip=["lm_head", "*.q_b_proj", "*.kv_b_proj"]),
}
EXPERT = "model.layers.1.mlp.experts"
PREDICTION = "model.layers.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    return with_prediction_layers(written_by_transformers("deepseek-groups", root / "hf").folder, root / "with", 1)


@pytest.fixture
def source(folder: Path, tmp_path: Path, make: Make) -> Artifact:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"tokenizer.json": b"{}"}
    return make(Store(tmp_path / "store"), files, kind="checkpoint")


def refused(source: Artifact, config: CompressConfig) -> str:
    """What is said; and nothing is left that could be loaded."""
    store = Store(source.root.parents[1])
    with pytest.raises(BadCheckpoint) as caught:
        COMPRESS(store, config, checkpoint=source)
    assert [manifest.id for manifest in store.all()] == [source.id]
    assert not list((store.root / "work").rglob("*.safetensors"))
    return str(caught.value)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensors], Mapping[str, Tensor]]) -> None:
    """Change the files behind the writer's back."""

    def save(model: Any, root: Path, tokenizer_from: Path) -> None:
        save_checkpoint(model, root, tokenizer_from)
        path = root / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path, {"format": "pt"})

    monkeypatch.setattr(stage, "save_checkpoint", save)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_sound_checkpoint_is_kept_and_what_was_seen_is_a_fact(config: CompressConfig, source: Artifact) -> None:
    made = COMPRESS(Store(source.root.parents[1]), config, checkpoint=source)
    assert 0.4 < made.manifest.facts["largest_error_steps"] <= 0.52
    assert 0 < made.manifest.facts["golden_nats"] < config.tolerated_nats


def without(tensors: Tensors, name: str) -> Tensors:
    del tensors[name]
    return tensors


def with_other(tensors: Tensors, name: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    return tensors | {name: change(tensors[name])}


def swapped(tensors: Tensors, one: str, other: str) -> Tensors:
    pairs = [(name, name.replace(one, other)) for name in tensors if name.startswith(f"{one}.")]
    return tensors | {name: tensors[partner] for name, partner in pairs} | {partner: tensors[name] for name, partner in pairs}


SCALE = "model.layers.0.self_attn.o_proj.weight_scale"
MUTATIONS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a dropped tensor of a prediction layer": (lambda t: without(t, f"{PREDICTION}.enorm.weight"), "3.enorm.weight was not written"),
    "a dropped prediction layer": (lambda t: {k: v for k, v in t.items() if not k.startswith(PREDICTION)}, rf"{PREDICTION}\."),
    "a dropped scale": (lambda t: without(t, SCALE), f"{SCALE} was not written"),
    "an inverted scale": (lambda t: with_other(t, SCALE, lambda s: 1 / s), "model.layers.0.self_attn.o_proj: a weight lies"),
    "a scale of half the value": (lambda t: with_other(t, SCALE, lambda s: s / 2), "model.layers.0.self_attn.o_proj: a weight lies"),
    "a scale of half the size": (lambda t: with_other(t, SCALE, lambda s: s[: len(s) // 2]), rf"{SCALE} is float16 \["),
    "swapped experts": (lambda t: swapped(t, f"{EXPERT}.0", f"{EXPERT}.1"), f"{EXPERT}.0.gate_proj: a weight lies"),
    "a norm that changed": (lambda t: with_other(t, "model.norm.weight", lambda w: w * 1.001), "model.norm.weight is not what it was"),
}


QUICK = {"int8 with activations", "int4 with zero points"}
"""Codes as they are, and words of codes with zero points; the others are words of codes, too, without."""


@pytest.mark.parametrize(
    "config", [pytest.param(config, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, config in CONFIGS.items()]
)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_spoilt_file_is_refused_and_the_tensor_named(
    mutation: str, config: CompressConfig, source: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, told = MUTATIONS[mutation]
    spoil(monkeypatch, change)
    assert re.search(told, refused(source, config))


def test_an_encoder_that_is_wrong_is_refused_though_files_and_memory_agree(source: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    right = formats.Integer.encode

    def coarse(self: formats.Integer, weight_OI: Tensor) -> dict[str, Tensor]:
        made = right(self, weight_OI)
        return made | {"weight_scale": made["weight_scale"] * 1.1}

    monkeypatch.setattr(formats.Integer, "encode", coarse)
    assert "a weight lies" in refused(source, CompressConfig())


def test_a_product_that_is_wrong_is_refused(source: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    right = formats.Integer.matmul
    monkeypatch.setattr(formats.Integer, "matmul", lambda *given: 1.5 * right(*given))
    assert "nats from the source's, tolerated are 0.05 (proof_nats)" in refused(source, CompressConfig())


def test_less_tolerance_than_the_format_costs_is_refused(source: Artifact) -> None:
    assert "take more bits or smaller groups" in refused(source, CompressConfig(proof_nats=1e-9))


def test_weights_in_half_precision_are_held_against_what_they_were(folder: Path, tmp_path: Path, make: Make) -> None:
    tensors, half = load_file(folder / "model.safetensors"), tmp_path / "half"
    half.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, half / "model.safetensors", {"format": "pt"})
    (half / "config.json").write_text((folder / "config.json").read_text().replace('"float32"', '"bfloat16"'))
    files = {path.name: path.read_bytes() for path in half.iterdir()} | {"tokenizer.json": b"{}"}
    source = make(Store(tmp_path / "store"), files, kind="checkpoint")
    made = COMPRESS(Store(tmp_path / "store"), CompressConfig(), checkpoint=source)
    assert made.manifest.facts["largest_error_steps"] <= 0.52
