"""Folders that are whole load to the last bit; those that are not are refused, naming what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toys import Theirs, agree, logits_of, prompt

from lineshaft.base.errors import BadCheckpoint, ConfigError, Corrupt, LineshaftError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.model import checkpoint
from lineshaft.model.adopt import ADOPT, AdoptConfig
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.ops.formats import Integer

Get = Callable[[str], Theirs]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(theirs: Get, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(theirs("deepseek").folder, tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **change: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "1 tensor is missing: model.layers.1.mlp.experts.3.up_proj"),
        (lambda t: t.update(stray=torch.zeros(1)), "1 tensor is not part of this model: stray"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "tensors are missing: .* \\.\\.\\."),
        (lambda t: t.update({"lm_head.weight": torch.zeros(61, 33)}), r"lm_head.weight has shape \[61, 33\], config.json means \[61, 32\]"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), "lm_head.weight is stored as torch.float8"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int32)}), "lm_head.weight is stored as torch.int32"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}), "several dtypes .*lm_head is torch.bfloat16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable[[Tensors], object], told: str) -> None:
    rewrite(folder, change)
    with pytest.raises(BadCheckpoint, match=told):
        load_checkpoint(folder)


def test_mixed_dtypes_load_once_one_is_asked_for(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    assert logits_of(load_checkpoint(folder, dtype=torch.float32), prompt(5)).dtype == torch.float32


def test_one_layer_too_many_in_another_family_is_no_prediction_layer(theirs: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(theirs("llama").folder, tmp_path / "llama"))
    rewrite(folder, lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.zeros(32)}))
    with pytest.raises(BadCheckpoint, match=r"not part of this model: model.layers.2"):
        load_checkpoint(folder)


def test_angles_stored_by_old_llama_files_and_a_written_out_tied_head_are_passed_over(theirs: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(theirs("llama-tied").folder, tmp_path / "llama"))
    expected = logits_of(load_checkpoint(folder), prompt(6))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(61, 32)}
    rewrite(folder, lambda t: t.update(extra))
    assert torch.equal(logits_of(load_checkpoint(folder), prompt(6)), expected)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_cut_weights_are_refused(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(BadCheckpoint, match=r"model.safetensors: can't be read as safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": "\xff"}', b"", b"[" * 100_000])
def test_broken_json_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=name):
        load_checkpoint(folder)


def test_a_folder_without_config_or_weights_or_no_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model.safetensors"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    for path in (folder, folder / "nowhere", Path(__file__)):
        with pytest.raises(BadCheckpoint, match=r"config.json"):
            load_checkpoint(path)


def test_a_cast_spares_the_router_bias(folder: Path) -> None:
    model = load_checkpoint(folder, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {name for name in dtypes if "correction" in name}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert logits_of(model, prompt(5)).isfinite().all()


def test_a_loaded_model_is_ready_to_answer_and_to_train_on(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert not model.training
    assert not any(tensor.requires_grad for tensor in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_same_model_is_written_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(load_checkpoint(folder), tmp_path / name, folder)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    save_checkpoint(load_checkpoint(tmp_path / "a"), tmp_path / "c", folder)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_tokenizer_files_come_along_untouched(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\x00 not ours to read")
    save_checkpoint(load_checkpoint(folder), tmp_path / "out", folder)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00 not ours to read"


def test_a_model_of_several_dtypes_is_not_written(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    model.lm_head = model.lm_head.bfloat16()
    with pytest.raises(ConfigError, match=r"one dtype.*bfloat16.*float32"):
        save_checkpoint(model, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


# -- compressed --------------------------------------------------------------------------------------------------


def test_compressed_weights_come_back_as_they_were(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    for name, linear in model.linears().items():
        if name != "lm_head":
            linear.recode(Integer(8, 4))
    save_checkpoint(model, tmp_path / "out", folder)
    again = load_checkpoint(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(again, prompt(9)), logits_of(model, prompt(9)))
    assert quantised_share_of_fp32(again) == quantised_share_of_fp32(model)
    assert quantised_share_of_fp32(load_checkpoint(folder)) is None


def test_a_quantisation_whose_groups_do_not_fit_names_the_layer(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    model.linears()["model.layers.0.mlp.up_proj"].recode(Integer(8, 16))
    save_checkpoint(model, tmp_path / "out", folder)
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    content["config_groups"]["group_0"]["weights"]["group_size"] = 48
    configure(tmp_path / "out", quantization_config=content)
    with pytest.raises(BadCheckpoint, match=r"model.layers.0.mlp.up_proj: int8: 32 inputs are not a multiple of 48"):
        load_checkpoint(tmp_path / "out")


# -- artifacts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(folder: Path, tmp_path: Path, make: Callable[..., Artifact]) -> Path:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"history.jsonl": b"{}\n"}
    return make(Store(tmp_path / "store"), files, kind="checkpoint").root


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "history.jsonl", "manifest.json"])
def test_an_artifact_with_one_flipped_bit_is_refused(artifact: Path, name: str) -> None:
    load_checkpoint(artifact)
    raw = bytearray((artifact / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (artifact / name).write_bytes(raw)
    with pytest.raises(Corrupt, match=rf"{name}: block 0"):
        load_checkpoint(artifact)


def test_an_artifact_is_checked_before_a_tensor_is_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(folder: Path) -> Any:
        raise AssertionError("read too early")

    (artifact / "extra.safetensors").write_bytes(b"put there later")
    monkeypatch.setattr(checkpoint, "read_tensors", nobody)
    with pytest.raises(Corrupt, match="put there later"):
        load_checkpoint(artifact)


def test_another_kind_of_artifact_is_no_checkpoint(tmp_path: Path, make: Callable[..., Artifact]) -> None:
    root = make(Store(tmp_path / "store"), {"documents.jsonl": b"{}\n"}, kind="corpus").root
    with pytest.raises(LineshaftError, match="kind corpus, not a checkpoint"):
        load_checkpoint(root)


def test_a_damaged_artifact_is_not_adopted(artifact: Path, tmp_path: Path) -> None:
    raw = bytearray((artifact / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (artifact / "model.safetensors").write_bytes(raw)
    (tmp_path / "draft").mkdir()
    with pytest.raises(Corrupt, match=r"model.safetensors: block 0"):
        ADOPT.build(Draft(tmp_path / "draft"), AdoptConfig(folder=str(artifact)))
    assert list((tmp_path / "draft").iterdir()) == []


# -- fewer experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek-groups"])
@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_experts_is_that_of_transformers(name: str, count: int, theirs: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(theirs(name).folder, tmp_path / "fewer"))
    configure(folder, num_experts_per_tok=count)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_checkpoint(theirs(name).folder, active_experts=count)
    assert agree(logits_of(ours, prompt(20)), Theirs(folder, model).logits(prompt(20)))
    assert not agree(logits_of(ours, prompt(20)), theirs(name).logits(prompt(20)))


@pytest.mark.parametrize("count", [0, -1, 9])
def test_experts_out_of_reach_are_refused(count: int, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"active_experts.*(num_experts_per_tok|experts in reach)"):
        load_checkpoint(folder, active_experts=count)


def test_a_model_without_experts_has_none_to_choose(theirs: Get) -> None:
    with pytest.raises(ConfigError, match="active_experts: llama has no experts"):
        load_checkpoint(theirs("llama").folder, active_experts=1)
