"""What memory.py counts against what PyTorch really holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shapes import SHAPES

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model import attend
from lineshaft.model import memory as memory_module
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import Kept, Memory, Packing, Stored, stored_in
from lineshaft.ops.formats import Fp8Block, Integer
from lineshaft.train.batches import Batch
from lineshaft.train.objective import NextToken

ROWS = 3
NARROW = ("mistral-window", "mistral-mixture", "llama-blocks")
"""Where tokens do not see everything before them, masks are cut into tiles that the count only comes near.

Nor is it exact for prediction layers in bfloat16: their residual is bfloat16, too, and is counted as float32.
"""


def batch(row: int, documents_a_row: int) -> Batch:
    """Rows of equally long documents."""
    count, length = row * ROWS, row // documents_a_row
    tokens = torch.arange(count) % 61
    return Batch(tokens, torch.arange(count) % length, tokens, torch.arange(0, count, length), row=row)


def saved_by_autograd(config: ModelConfig, given: Batch, bfloat16: bool) -> int:
    """Bytes of all memory that autograd keeps, parameters and each piece of memory once."""
    model = Decoder(config)
    model.initialise(1)
    model.train()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = NextToken()(model, given)
    assert loss.total.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("packing", "row", "documents"), [("whole", 24, 1), ("mask", 24, 2), ("alone", 256, 2), ("whole", 256, 1)])
def test_what_training_keeps_is_what_autograd_saves(name: str, bfloat16: bool, packing: Packing, row: int, documents: int) -> None:
    config = SHAPES[name]
    counted = Kept(config, row * ROWS, row, bfloat16, packing).total()
    tiled = (name in NARROW and (packing == "alone" or row > 24)) or name == "deepseek-v32" or (bfloat16 and name == "deepseek-v3-mtp")
    assert counted == pytest.approx(saved_by_autograd(config, batch(row, documents), bfloat16), rel=0.09 if tiled else 0.01)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fmt", ["dense", "int8", "int8-4", "fp8"])
def test_bytes_by_format_are_those_of_the_tensors(name: str, fmt: str) -> None:
    config, model = SHAPES[name], Decoder(SHAPES[name])
    formats = {"int8": Integer(8), "int8-4": Integer(8, 4), "fp8": Fp8Block()}
    for layer, linear in model.linears().items():
        if fmt in formats and layer != "lm_head":
            linear.reserve(formats[fmt])
    assert Stored("float32", fmt).total(config) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_half_the_bytes_in_bfloat16() -> None:
    for config in SHAPES.values():
        assert 2 * Stored("bfloat16").total(config) == Stored().total(config)


def test_the_largest_phase_is_the_peak() -> None:
    memory = Memory({"loading": {"weights": 5}, "running": {"weights": 3, "cache": 4}})
    assert (memory.peak, memory.total) == ("running", 7)


def test_constants_that_are_repeated_are_equal() -> None:
    assert (memory_module.ALONE, memory_module.SCORED) == (attend.ALONE, attend.SCORED)


def test_how_a_folder_stores_its_weights_is_read_from_its_config(tmp_path: Path) -> None:
    def stored(**config: object) -> Stored:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return stored_in(tmp_path)

    int8 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}}}}
    assert stored() == Stored("float32")
    assert stored(torch_dtype="bfloat16") == Stored("bfloat16")
    assert stored(dtype="float16", quantization_config=int8) == Stored("float16", "int8")
    int8["config_groups"] = {"group_0": {"weights": {"group_size": 32}}}
    assert stored(quantization_config=int8) == Stored("float32", "int8-32")
    assert stored(dtype="bfloat16", quantization_config={"quant_method": "fp8"}) == Stored("bfloat16", "fp8")
    with pytest.raises(BadCheckpoint, match="float64"):
        stored(dtype="float64")


def test_files_that_are_there_are_weighed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1234))
    assert stored_in(tmp_path).total(SHAPES["llama"]) == 1234
    assert stored_in(tmp_path).cast("bfloat16").total(SHAPES["llama"]) == Stored("bfloat16").total(SHAPES["llama"])
