"""Layers for multi-token prediction in files: kept whole, their copies written for others, and never lost in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toys import Theirs, with_prediction_layers

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.ops.formats import Integer

Get = Callable[[str], Theirs]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(theirs: Get, tmp_path: Path) -> Path:
    """Two prediction layers with their copies, after three layers."""
    return with_prediction_layers(theirs("deepseek").folder, tmp_path / "mtp", 2, copies=True)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **change: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def stored(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


COPIES = {f"model.layers.{layer}.{name}.weight" for layer in (3, 4) for name in ("embed_tokens", "shared_head.head")}


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("there", [True, False], ids=["copies", "no copies"])
def test_every_tensor_is_written_back_with_the_copies(there: bool, shard_bytes: int, folder: Path, tmp_path: Path) -> None:
    before = stored(folder)
    if not there:
        rewrite(folder, lambda t: [t.pop(name) for name in COPIES])
    save_checkpoint(load_checkpoint(folder), tmp_path / "out", folder, shard_bytes=shard_bytes)
    after = stored(tmp_path / "out")
    assert after.keys() == before.keys() > COPIES
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 2


def test_copies_take_no_memory_of_their_own(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert not COPIES & model.state_dict().keys()
    assert len(model.model.layers) == 5


@pytest.mark.parametrize("name", sorted(COPIES))
@pytest.mark.parametrize("change", [lambda t: -t, lambda t: t.bfloat16(), lambda t: t[:, :-1].contiguous()], ids=["sign", "dtype", "shape"])
def test_a_copy_that_differs_is_refused(name: str, change: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> None:
    rewrite(folder, lambda t: t.update({name: change(t[name])}))
    with pytest.raises(UnsupportedModel, match=f"{name}: .*differs from (model.embed_tokens|lm_head).weight"):
        load_checkpoint(folder)


def test_minus_zero_is_not_zero_in_a_copy(folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "model.layers.4.embed_tokens.weight"):
            tensors[name][0, 0] = 0.0
        tensors["model.layers.3.embed_tokens.weight"][0, 0] = -0.0

    rewrite(folder, spoil)
    with pytest.raises(UnsupportedModel, match=r"model.layers.3.embed_tokens.weight"):
        load_checkpoint(folder)


def test_a_compressed_head_is_copied_as_it_is_stored(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    for linear in model.linears().values():
        linear.recode(Integer(8))
    save_checkpoint(model, tmp_path / "out", folder)
    tensors = stored(tmp_path / "out")
    for part in Integer(8).tensor_names:
        assert torch.equal(tensors[f"model.layers.4.shared_head.head.{part}"], tensors[f"lm_head.{part}"])
    again = load_checkpoint(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert again.keys() == model.state_dict().keys()


def test_a_tied_head_is_copied_too(folder: Path, tmp_path: Path) -> None:
    def tie(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors |= {name: tensors["model.embed_tokens.weight"].clone() for name in COPIES}

    rewrite(folder, tie)
    configure(folder, tie_word_embeddings=True)
    save_checkpoint(load_checkpoint(folder), tmp_path / "out", folder)
    assert stored(tmp_path / "out").keys() == stored(folder).keys()


# -- lost, or not announced --------------------------------------------------------------------------------------


def test_layers_that_another_tool_lost_are_told_and_done_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers writes the number of them by default, and never the layers."""
    config = transformers.DeepseekV3Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1, pad_token_id=None,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).config.num_nextn_predict_layers == 0
    assert "num_nextn_predict_layers 1, but no tensor is of such a layer" in capfd.readouterr().err
    configure(tmp_path, num_nextn_predict_layers=0)
    load_checkpoint(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("said", "told"), [(0, "0: set it to 2"), (1, "1: set it to 2"), (None, "0: set it to 2")])
def test_layers_that_config_json_does_not_announce_are_refused(said: int | None, told: str, folder: Path) -> None:
    configure(folder, num_nextn_predict_layers=said)
    with pytest.raises(BadCheckpoint, match=rf"multi-token-prediction layers \(model.layers.{3 + (said or 0)}.\*\).*{told}"):
        load_checkpoint(folder)


def test_a_layer_that_is_lost_in_part_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.4.eh_proj.weight"))
    with pytest.raises(BadCheckpoint, match=r"missing: model.layers.4.eh_proj.weight"):
        load_checkpoint(folder)
