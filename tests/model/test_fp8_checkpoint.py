"""FP8 as DeepSeek ships it: kept and decoded alike it is the model that transformers decodes; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import TOKENS, Theirs, agree, logits_of, prompt, with_prediction_layers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts, FP8Linear
from transformers.quantizers import quantizer_finegrained_fp8

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.base.store import Draft
from lineshaft.model import adopt
from lineshaft.model.adopt import ADOPT, AdoptConfig
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.ops.formats import DENSE, Fp8Block, Integer

Get = Callable[[str], Theirs]
Tensors = dict[str, Tensor]
KEPT_DENSE = ("embed_tokens", "lm_head", "norm", ".gate.", "shared_expert_gate", "eh_proj", "shared_head", "weights_proj", "bias")
"""What DeepSeek leaves in BF16."""
FITS = (2, 4)
"""A block that divides every matrix of the toys: transformers decodes no others."""
PARTIAL = (5, 7)
NAMES = ["deepseek", "deepseek_v2", "deepseek_v32", "mixtral", "qwen3_moe", "qwen2_moe", "llama"]


def as_fp8(source: Path, folder: Path, block: tuple[int, int], **more: Any) -> Path:
    """A copy of a checkpoint whose matrices are FP8, as DeepSeek's are."""
    shutil.copytree(source, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        if not any(part in name for part in KEPT_DENSE):
            tensors |= {f"{name.removesuffix('.weight')}.{part}": item for part, item in Fp8Block(block).encode(tensor).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    method = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block), **more}
    configure(folder, quantization_config=method)
    return folder


def configure(folder: Path, **change: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def decoded_elsewhere(folder: Path, block: tuple[int, int]) -> Tensors:
    """Every tensor dense: by transformers where it can, else by indices in float64."""
    stored, dense = load_file(folder / "model.safetensors"), {}
    oracle = Fp8Dequantize(SimpleNamespace())
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"]
            rows, columns = (torch.arange(size) // each for size, each in zip(tensor.shape, block, strict=True))
            dense[name] = (tensor.double() * scale.double()[rows][:, columns]).float()
            if block == FITS:
                assert torch.equal(dense[name], oracle._dequantize_one(tensor, scale, torch.float32))
        elif not name.endswith("_scale_inv"):
            dense[name] = tensor
    return dense


def dense_folder(folder: Path, target: Path, block: tuple[int, int]) -> Path:
    shutil.copytree(folder, target)
    save_file(decoded_elsewhere(folder, block), target / "model.safetensors", {"format": "pt"})
    configure(target, quantization_config=None)
    return target


@pytest.mark.parametrize("block", [FITS, PARTIAL], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kept_or_decoded_it_is_the_model_that_its_decoded_weights_are(
    name: str, block: tuple[int, int], theirs: Get, tmp_path: Path
) -> None:
    folder = as_fp8(theirs(name).folder, tmp_path / "fp8", block)
    dense = dense_folder(folder, tmp_path / "dense", block)
    kept, decoded = load_checkpoint(folder), load_checkpoint(folder, dequantise=True)
    formats = {linear.format for linear in kept.linears().values()}
    assert formats == {Fp8Block(block), DENSE}
    assert {linear.format for linear in decoded.linears().values()} == {DENSE}
    expected = load_checkpoint(dense).state_dict()
    assert decoded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in decoded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in decoded.parameters())
    logits = logits_of(kept, prompt(TOKENS))
    assert agree(logits, logits_of(decoded, prompt(TOKENS)), 1e-6)
    reference = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    assert agree(logits, Theirs(dense, reference).logits(prompt(TOKENS)))


@pytest.mark.parametrize("name", ["deepseek", "mixtral", "qwen2_moe", "llama-biased"])
def test_transformers_loads_what_we_save(name: str, theirs: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for accelerate, which it does not use on a CPU, where it decodes while it loads."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    ours = load_checkpoint(as_fp8(theirs(name).folder, tmp_path / "fp8", FITS))
    save_checkpoint(ours, tmp_path / "out", tmp_path, shard_bytes=20_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    assert agree(logits_of(ours, prompt(TOKENS)), Theirs(tmp_path / "out", model.eval().float()).logits(prompt(TOKENS)))


@pytest.mark.parametrize("name", NAMES)
def test_where_it_keeps_fp8_transformers_keeps_our_layers_and_no_other(name: str, theirs: Get, tmp_path: Path) -> None:
    """What it does on a GPU, as far as that can be seen without one: the layers it makes room for, experts being one module."""
    ours = load_checkpoint(as_fp8(theirs(name).folder, tmp_path / "fp8", FITS))
    save_checkpoint(ours, tmp_path / "out", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    asked = transformers.FineGrainedFP8Config(**config.quantization_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer(asked, pre_quantized=True)._process_model_before_weight_loading(model)
    kept = {key for key, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert kept == {key for key, linear in ours.linears().items() if linear.format != DENSE and ".experts." not in key}
    blocks = {key for key, module in model.named_modules() if isinstance(module, FP8Experts)}
    assert blocks == {key.split(".experts.")[0] + ".experts" for key in ours.linears() if ".experts." in key}


@pytest.mark.parametrize("more", [{}, {"scale_fmt": "ue8m0"}], ids=str)
@pytest.mark.parametrize("name", ["deepseek", "mixtral"])
def test_kept_weights_are_written_back_bit_for_bit(name: str, more: dict[str, str], theirs: Get, tmp_path: Path) -> None:
    folder = as_fp8(theirs(name).folder, tmp_path / "fp8", PARTIAL, **more)
    save_checkpoint(load_checkpoint(folder, dtype=torch.float32), tmp_path / "out", folder)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = written.pop("modules_to_not_convert")
    assert written == json.loads((folder / "config.json").read_text())["quantization_config"]
    scaled = {key.removesuffix(".weight_scale_inv") for key in before if key.endswith("_scale_inv")}
    assert not scaled & set(left)
    assert {"lm_head", f"model.layers.1.{'block_sparse_moe' if name == 'mixtral' else 'mlp'}.gate"} <= set(left)


def test_dense_weights_in_another_dtype_leave_codes_and_scales_alone(theirs: Get, tmp_path: Path) -> None:
    folder = as_fp8(theirs("deepseek").folder, tmp_path / "fp8", PARTIAL)
    rewrite(
        folder, lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items() if key.endswith("_scale_inv")})
    )  # as Qwen's are
    model = load_checkpoint(folder, dtype=torch.bfloat16)
    dtypes = {key.rsplit(".", 1)[1]: tensor.dtype for key, tensor in model.state_dict().items() if "q_a_proj" in key}
    assert dtypes == {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.bfloat16}
    assert logits_of(model, prompt(5)).dtype == torch.bfloat16
    decoded = load_checkpoint(folder, dtype=torch.bfloat16, dequantise=True).state_dict()
    assert {tensor.dtype for key, tensor in decoded.items() if "correction" not in key} == {torch.bfloat16}


def test_prediction_layers_in_fp8_keep_their_copies(theirs: Get, tmp_path: Path) -> None:
    source = with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 1, copies=True)
    folder = as_fp8(source, tmp_path / "fp8", PARTIAL)
    model = load_checkpoint(folder)
    assert model.linears()["model.layers.3.self_attn.o_proj"].format == Fp8Block(PARTIAL)
    assert model.linears()["model.layers.3.eh_proj"].format == DENSE
    save_checkpoint(model, tmp_path / "out", folder)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"model.layers.3.eh_proj", "model.layers.3.shared_head.head"} <= set(left)


# -- refused -----------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        (
            lambda t: t.pop(f"{LAYER}.weight_scale_inv"),
            BadCheckpoint,
            "o_proj.weight is stored as torch.float8_e4m3fn, but there is no weight_scale",
        ),
        (lambda t: t.pop(f"{LAYER}.weight"), BadCheckpoint, "missing: model.layers.0.self_attn.o_proj.weight"),
        (lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(2, 2)}), BadCheckpoint, r"weight_scale_inv has shape \[2, 2\]"),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(32, 32)}),
            BadCheckpoint,
            "o_proj.weight is stored as torch.float32, its format",
        ),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float().to(torch.float8_e5m2)}), BadCheckpoint, "torch.float8_e5m2"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale_inv": t[f"{LAYER}.weight_scale_inv"].to(torch.float8_e8m0fnu)}),
            UnsupportedModel,
            r"o_proj.weight_scale_inv: scales stored as float8_e8m0fnu \(ue8m0\)",
        ),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), BadCheckpoint, "lm_head.weight is stored as"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], object], kind: type[Exception], told: str, theirs: Get, tmp_path: Path
) -> None:
    folder = as_fp8(theirs("deepseek").folder, tmp_path / "fp8", PARTIAL)
    rewrite(folder, change)
    with pytest.raises(kind, match=told):
        load_checkpoint(folder)


def test_scales_without_a_description_are_named_and_the_cause_is_told(theirs: Get, tmp_path: Path) -> None:
    folder = as_fp8(theirs("deepseek").folder, tmp_path / "fp8", PARTIAL)
    configure(folder, quantization_config=None)
    with pytest.raises(BadCheckpoint, match=r"not part of this model: .*weight_scale_inv.*quantization_config"):
        load_checkpoint(folder)


def test_another_block_than_the_scales_have_is_named(theirs: Get, tmp_path: Path) -> None:
    folder = as_fp8(theirs("llama").folder, tmp_path / "fp8", PARTIAL)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(BadCheckpoint, match=r"weight_scale_inv has shape .* config.json means \[1, 1\]"):
        load_checkpoint(folder)


def test_two_quantised_formats_are_not_written(theirs: Get, tmp_path: Path) -> None:
    model = load_checkpoint(as_fp8(theirs("llama").folder, tmp_path / "fp8", PARTIAL))
    model.linears()["lm_head"].recode(Integer(8))
    with pytest.raises(ConfigError, match="FP8 layers can't be saved in one checkpoint with layers in another"):
        save_checkpoint(model, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


# -- taken into the store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dequantise", [False, True])
def test_adopting_keeps_or_decodes(dequantise: bool, theirs: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt.contract, "facts_of", lambda *_: {})  # a toy has no tokenizer
    folder = as_fp8(theirs("deepseek").folder, tmp_path / "fp8", PARTIAL)
    draft = Draft(tmp_path / "draft")
    draft.root.mkdir()
    ADOPT.build(draft, AdoptConfig(folder=str(folder), dequantise=dequantise))
    assert draft.facts["format"] == ("dense" if dequantise else "dense, fp8, one scale a block of 5x7")
    assert torch.equal(
        logits_of(load_checkpoint(draft.root), prompt(9)), logits_of(load_checkpoint(folder, dequantise=dequantise), prompt(9))
    )
