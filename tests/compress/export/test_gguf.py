"""GGUF files against the package of llama.cpp's makers: names, keys and blocks are theirs, weights are ours to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
import transformers
from export_toys import FORMS, WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOYS, with_prediction_layers

from lineshaft.base.errors import BadCheckpoint, ConfigError, MissingExtra, UnsupportedModel
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.export import gguf as writing
from lineshaft.compress.export import gguf_proof
from lineshaft.compress.export.blocks import coded_rows, kind_of
from lineshaft.compress.export.exporting import export
from lineshaft.compress.export.gguf_metadata import metadata
from lineshaft.compress.export.gguf_names import Turned
from lineshaft.compress.stage import compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.config import from_hf
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Fp8Block, Integer

gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'lineshaft[export]'")

Source = Callable[..., Path]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as their own package decodes it, float32."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors}


def same(found: np.ndarray, meant: torch.Tensor) -> bool:
    return np.array_equal(found.view(np.int32), np.ascontiguousarray(meant.float().numpy()).view(np.int32))


# -- blocks


@given(
    st.sampled_from([(8, None), (8, 32), (8, 64), (8, 128), (4, None), (4, 32), (4, 64), (4, 128)]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([1e-9, 1e-3, 1.0, 300.0]),
)
@settings(max_examples=60)
def test_blocks_are_the_codes_and_scales_that_were_there(
    coding: tuple[Any, Any], outputs: int, groups: int, seed: int, size: float
) -> None:
    linear = Linear(128 * groups, outputs)
    generator = torch.Generator().manual_seed(seed)
    linear.weight = torch.nn.Parameter(torch.randn(outputs, 128 * groups, generator=generator) * size)
    linear.recode(Integer(*coding))
    kind = kind_of("it", linear)
    assert kind == {8: "Q8_0", 4: "Q4_0"}[coding[0]]
    decoded = gguf.dequantize(coded_rows("it", linear).numpy(), gguf.GGMLQuantizationType[kind])
    assert same(decoded, linear.dense_weight(torch.float32))


@given(st.sampled_from([None, 32, 64, 128]), st.integers(0, 2**31), st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
@settings(max_examples=40)
def test_offsets_move_a_weight_by_what_fp16_must(group: int | None, seed: int, size: float) -> None:
    linear = Linear(256, 3)
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * size
    linear.weight = torch.nn.Parameter(weight + size * weight.mean())
    linear.recode(Integer(4, group, symmetric=False))
    assert kind_of("it", linear) == "Q4_1"
    decoded = gguf.dequantize(coded_rows("it", linear).numpy(), gguf.GGMLQuantizationType.Q4_1)
    ints = linear.format.integers(linear.tensors())
    scale = ints.scale_OG.repeat_interleave(256 // ints.scale_OG.shape[1], 1).double().numpy()
    zero = ints.zero_OG.repeat_interleave(256 // ints.zero_OG.shape[1], 1).double().numpy()
    exact = (ints.codes_OI.double().numpy() - zero) * scale
    assert (np.abs(decoded - exact) <= np.maximum(zero * scale * 2**-11, 2**-25) + 30 * scale * 2**-23).all()


@pytest.mark.parametrize(
    ("fmt", "inputs", "told"),
    [(Integer(8, 16), 64, "group"), (Integer(8), 48, "48 inputs"), (Fp8Block((32, 32)), 64, "fp8"), (Integer(4, 8), 64, "group of 8")],
)
def test_a_layer_that_no_block_can_say_is_named(fmt: Any, inputs: int, told: str) -> None:
    linear = Linear(inputs, 4)
    torch.nn.init.normal_(linear.weight)
    linear.recode(fmt)
    with pytest.raises(ConfigError, match=rf"model\.layers\.3\.x.*{told}"):
        kind_of("model.layers.3.x", linear)


def test_a_scale_that_fp16_does_not_have_is_refused_not_rounded() -> None:
    linear = Linear(32, 4)
    torch.nn.init.normal_(linear.weight)
    linear.recode(Integer(8))
    linear.weight_scale = linear.weight_scale.float() * 1.0001
    with pytest.raises(ConfigError, match="FP16"):
        coded_rows("it", linear)


# -- names and keys


def hf_name(ours: str) -> str:
    """What the package's table of Hugging Face names calls one of our tensors, experts put together and keys apart from values."""
    for one in range(8):
        ours = ours.replace(f".experts.{one}.", ".experts.")
    return ours.replace("e_score_correction_bias", "e_score_correction.bias").removesuffix(".weight").removesuffix(".bias")


@pytest.mark.parametrize("name", ["llama-biased", "mixtral", "qwen2", "qwen3", "qwen3_moe", "deepseek", "deepseek_v2-direct-query"])
def test_names_are_those_of_their_own_table(name: str, source: Source) -> None:
    model = load_checkpoint(source(name))
    table = gguf.get_tensor_name_map(ARCHITECTURES[model.config.family], model.config.num_hidden_layers)
    weights = writing.weights_of(model)
    for entry in writing.entries(model.config, weights):
        for ours in entry.place.sources:
            theirs = hf_name(ours)
            if entry.place.move in ("keys", "values"):
                theirs = theirs.replace("kv_b_proj", {"keys": "k_b_proj", "values": "v_b_proj"}[entry.place.move])
            assert f"{table.get_name(theirs)}.{entry.place.name.rpartition('.')[2]}" == entry.place.name, ours
    assert {ours for entry in writing.entries(model.config, weights) for ours in entry.place.sources} == weights.keys()


def known_keys(arch: str) -> set[str]:
    groups = [vars(group) for group in vars(gguf.Keys).values() if isinstance(group, type)]
    return {value.replace("{arch}", arch) for group in groups for value in group.values() if isinstance(value, str)}


KEYED = ["llama-yarn-factor-of-its-own", "llama-linear", "mixtral", "qwen3_moe", "deepseek-groups", "grid-yarn-qlora-4groups-1dense"]


@pytest.mark.parametrize("name", KEYED)
def test_keys_are_those_of_their_own_package(name: str, source: Source, tmp_path: Path) -> None:
    export(source(name), tmp_path / "m.gguf", "gguf", tokenizer="none")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    arch = reader.get_field("general.architecture").contents()
    said = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert said - known_keys(arch) <= {f"{arch}.vocab_size"}


@pytest.mark.parametrize(("heads", "still", "turned"), [(1, 0, 2), (3, 0, 8), (2, 5, 6), (1, 12, 4)])
def test_turning_neighbours_in_the_new_order_is_turning_halves_in_the_old(heads: int, still: int, turned: int) -> None:
    rng = np.random.default_rng(0)
    rows, angle = rng.normal(size=(heads, still + turned)), rng.normal(size=turned // 2)
    halves = rows.copy()
    first, second = rows[:, still : still + turned // 2], rows[:, still + turned // 2 :]
    halves[:, still : still + turned // 2] = first * np.cos(angle) - second * np.sin(angle)
    halves[:, still + turned // 2 :] = first * np.sin(angle) + second * np.cos(angle)
    order = np.array(Turned(heads, still, turned).order())
    neighbours = rows.flatten()[order].reshape(heads, -1).copy()
    for pair in range(turned // 2):
        x, y = (neighbours[:, still + 2 * pair + side].copy() for side in (0, 1))
        neighbours[:, still + 2 * pair] = x * np.cos(angle[pair]) - y * np.sin(angle[pair])
        neighbours[:, still + 2 * pair + 1] = x * np.sin(angle[pair]) + y * np.cos(angle[pair])
    assert np.allclose(neighbours.flatten(), halves.flatten()[order])


# -- whole files


def held(model: Decoder, path: Path) -> int:
    """How many tensors that need no move hold the model's weights to the bit, as their package decodes them."""
    found, seen = tensors_of(path), 0
    for entry in writing.entries(model.config, weights := writing.weights_of(model)):
        if entry.place.move in ("none", "stack") and entry.kind != "Q4_1":
            parts = [weights[name] for name in entry.place.sources]
            meant = [part.dense_weight(torch.float32) if isinstance(part, Linear) else part.float() for part in parts]
            assert same(found[entry.place.name], torch.stack(meant) if entry.place.move == "stack" else meant[0]), entry.place.name
            seen += 1
    return seen


@pytest.mark.parametrize("form", ["", "bf16", *FORMS])
@pytest.mark.parametrize("name", ["wide-llama", "wide-mixtral", "wide-qwen2", "wide-deepseek-half-split"])
def test_a_file_holds_the_model_as_it_is(name: str, form: str, source: Source, tmp_path: Path) -> None:
    done = export(source(name, form), tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert done.path == tmp_path / "m.gguf"
    assert done.bytes == done.path.stat().st_size
    assert FORMS.get(form, (None, {"": "F32", "bf16": "BF16"}.get(form)))[1] in done.kinds
    assert (done.seen["offset_error_steps"] > 0) == (form == "int4-32-zeros")
    assert done.seen["offset_error_steps"] < 0.0075
    assert held(load_checkpoint(source(name, form)), done.path) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_groups_of_128_become_blocks_with_one_scale(source: Source, tmp_path: Path) -> None:
    model = load_checkpoint(source("broad-llama"))
    compress(model, CompressConfig(policy={"*.self_attn.*": "int4-64", "*.mlp.*": "int8-128"}))
    save_checkpoint(model, tmp_path / "hf", source("broad-llama"))
    done = export(tmp_path / "hf", tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert done.kinds == {"F32": 7, "Q4_0": 8, "Q8_0": 6}
    assert held(load_checkpoint(tmp_path / "hf"), done.path) > 10


def test_the_same_checkpoint_gives_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(source("wide-mixtral", "int8"), tmp_path / name, "gguf", tokenizer="none")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_prediction_layers_are_left_out_and_that_is_said(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_prediction_layers(source("deepseek"), tmp_path / "hf", 1, copies=True)
    export(folder, tmp_path / "with.gguf", "gguf", tokenizer="none")
    assert "multi-token-prediction" in capsys.readouterr().err
    export(source("deepseek"), tmp_path / "without.gguf", "gguf", tokenizer="none")
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


def test_rounded_activations_are_dropped_with_a_word(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(source("wide-llama", "int8-a8"), tmp_path / "m", "gguf", tokenizer="none")
    assert "activations are rounded to int8 is not carried over" in capsys.readouterr().err
    export(source("wide-llama", "int8"), tmp_path / "m", "gguf", tokenizer="none")
    assert "activations" not in capsys.readouterr().err


# -- refusals


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llama-dynamic", "dynamic"),
        ("llama-yarn-other-betas", "beta_fast"),
        ("llama-yarn-untruncated", "truncate"),
        ("mistral-window", "window"),
        ("mixtral-window", "window"),
        ("qwen2-window-by-layer-types", "window"),
        ("qwen3-biased", "attention_bias"),
        ("qwen3_moe-dense-layers", "dense layers"),
        ("qwen2_moe", "qwen2_moe"),
        ("deepseek-biased", "attention_bias"),
        ("deepseek-yarn-no-mscale", "mscale"),
        ("deepseek-yarn-two-mscales", "mscale"),
        ("deepseek_v2-groups", "group_limited_greedy"),
        ("deepseek_v32", "deepseek_v32"),
    ],
)
def test_what_llama_cpp_could_not_run_as_we_do_is_refused_by_name(name: str, told: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        export(source(name), tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("deepseek", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("deepseek", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "linear"),
        ("qwen2", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3", **toys._LLAMA3}}, "llama3"),
    ],
)
def test_options_that_would_be_misread_are_refused(name: str, changes: dict[str, Any], told: str, source: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(source(name), tmp_path / "hf")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | changes))
    with pytest.raises(UnsupportedModel, match=told):
        export(folder, tmp_path / "m.gguf", "gguf", tokenizer="none")


def test_experts_in_unlike_formats_are_refused(source: Source, tmp_path: Path) -> None:
    model = load_checkpoint(source("wide-mixtral"))
    compress(model, CompressConfig(policy={"*.experts.2.*": "int4-32"}))
    save_checkpoint(model, tmp_path / "hf", source("wide-mixtral"))
    with pytest.raises(ConfigError, match=r"experts are stored as Q4_0 and Q8_0"):
        export(tmp_path / "hf", tmp_path / "m.gguf", "gguf", tokenizer="none")


@pytest.mark.parametrize("target", [".", "no/such/folder/m.gguf"])
def test_a_target_that_is_no_file_is_refused(target: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the file to write"):
        export(source("llama-tied"), tmp_path / target, "gguf", tokenizer="none")


def test_a_missing_package_is_one_line(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"lineshaft\[export\]"):
        export(source("llama-tied"), tmp_path / "m.gguf", "gguf", tokenizer="none")


# -- the proof


def spoiled(monkeypatch: pytest.MonkeyPatch, at: Callable[[Path], int]) -> None:
    """Flip a bit of the file once it is written."""
    write = writing.write

    def bad(path: Path, *rest: Any) -> None:
        write(path, *rest)
        data = bytearray(path.read_bytes())
        data[at(path)] ^= 1
        path.write_bytes(bytes(data))

    monkeypatch.setattr(writing, "write", bad)


@pytest.mark.parametrize("form", ["", "bf16", "int8", "int4-32", "int4-32-zeros"])
def test_a_bit_that_flips_in_any_tensor_is_seen_and_nothing_is_kept(
    form: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(source("wide-deepseek", form), tmp_path / "m.gguf", "gguf", tokenizer="none")
    before = (tmp_path / "m.gguf").read_bytes()
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
    chosen = [
        name for name in names if name.startswith(("token_embd", "blk.1.attn_k_b", "blk.1.attn_v_b", "blk.1.ffn_down_exps", "blk.2.exp"))
    ]
    assert len(chosen) == 5
    for name in chosen:
        with monkeypatch.context() as patched:
            spoiled(patched, lambda path, name=name: next(int(t.data_offset) + 1 for t in gguf.GGUFReader(path).tensors if t.name == name))
            with pytest.raises(BadCheckpoint, match=name):
                export(source("wide-deepseek", form), tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_a_tensor_that_is_not_written_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write
    monkeypatch.setattr(writing, "write", lambda path, config, weights, listed, said: write(path, config, weights, listed[:-1], said))
    with pytest.raises(BadCheckpoint, match=r"output\.weight|output_norm"):
        export(source("wide-llama"), tmp_path / "m.gguf", "gguf", tokenizer="none")
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_says_something_else_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write
    monkeypatch.setattr(writing, "write", lambda p, c, w, e, said: write(p, c, w, e, {**said, "llama.rope.freq_base": 1.0}))
    with pytest.raises(BadCheckpoint, match=r"llama\.rope\.freq_base"):
        export(source("wide-llama"), tmp_path / "m.gguf", "gguf", tokenizer="none")


def test_every_toy_has_a_place_for_all_its_tensors_or_is_refused_by_name() -> None:
    done = 0
    for family, options in [*TOYS.values(), *WIDE.values()]:
        config = from_hf(getattr(transformers, f"{family}Config")(**{**toys._SHAPE, **options}).to_dict())
        with torch.device("meta"):
            model = Decoder(config)
        try:
            metadata(config)
        except UnsupportedModel:
            continue
        weights = writing.weights_of(model)
        listed = writing.entries(config, weights)
        assert sum(int(np.prod(entry.shape)) for entry in listed if entry.place.sources) == sum(
            weight.in_features * weight.out_features if isinstance(weight, Linear) else weight.numel() for weight in weights.values()
        )
        done += 1
    assert done > 60


def test_the_proof_decodes_every_kind_as_their_package_does() -> None:
    rng = np.random.default_rng(1)
    for kind, (weights, size) in {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}.items():
        data = rng.integers(0, 256, (40, size), dtype=np.uint8)
        data[:, 1::2][:, :2] &= 0x3F  # scales and offsets stay finite
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
        assert theirs.size == 40 * weights
        assert np.array_equal(gguf_proof._decoded(kind, data.reshape(-1)), theirs.reshape(-1), equal_nan=True)
