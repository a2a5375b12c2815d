"""What memory.py counts against what PyTorch really holds."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model import attend
from lineshaft.model import memory as memory_module
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import Product, products
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import Kept, Memory, Packing, Stored, is_format, stored_in
from lineshaft.ops import reference
from lineshaft.ops.formats import DENSE, Format, Fp8Block, Integer
from lineshaft.ops.quantization import to_quantization_config
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


FORMATS = {
    "dense": DENSE,
    "fp8": Fp8Block(),
    "int8": Integer(8),
    "int8-4": Integer(8, 4),
    "int8-a8": Integer(8, activations="int8"),
    "int4": Integer(4),
    "int4-8": Integer(4, 8),
    "int4-zeros": Integer(4, symmetric=False),
    "int4-8-zeros-a8": Integer(4, 8, symmetric=False, activations="int8"),
}


def fits(name: str, fmt: str) -> bool:
    return not fmt.startswith("int4") or all(item.inputs % 8 == 0 for item in products(SHAPES[name]) if item.linear)


@pytest.mark.parametrize(("name", "fmt"), [(name, fmt) for name in SHAPES for fmt in FORMATS if fits(name, fmt)])
def test_bytes_by_format_are_those_of_the_tensors(name: str, fmt: str) -> None:
    config, model = SHAPES[name], Decoder(SHAPES[name])
    for layer, linear in model.linears().items():
        if fmt != "dense" and layer != "lm_head":
            linear.reserve(FORMATS[fmt])
    assert Stored("float32", fmt).total(config) == sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("fmt", [name for name in FORMATS if name.startswith("int")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_what_a_product_holds_is_counted(fmt: str, dtype: str, tokens: int) -> None:
    """Against the allocator: the most that was live at once, rows and results left out."""
    stored = FORMATS[fmt].encode(torch.randn(384, 2048))
    x = torch.randn(tokens, 2048).to(getattr(torch, dtype))
    FORMATS[fmt].matmul(x, stored, None)
    counted = Stored(dtype, fmt).working(Product(2048, 384), dtype, tokens)
    result = 2 * 384 * tokens * x.element_size()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        FORMATS[fmt].matmul(x, stored, None)
    changes = [event.nbytes() for event in _memory_events(seen)]
    peak = max(accumulate(changes))
    assert counted * 0.6 <= peak <= counted * 1.05 + result


def _memory_events(seen: profile) -> list[Any]:
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())


@pytest.mark.parametrize("name", [*FORMATS, "int8-128", "int4-32-a8"])
def test_formats_have_names(name: str) -> None:
    assert is_format(name)


@pytest.mark.parametrize(
    "name", ["", "int", "int2", "int8-", "int8-0", "int8-a8-32", "int8-zeros", "int8-32-zeros-a8", "fp8-a8", "dense-32"]
)
def test_other_names_mean_nothing(name: str) -> None:
    assert not is_format(name)


@pytest.mark.parametrize(("name", "fmt"), FORMATS.items())
def test_what_is_written_of_a_format_is_its_name(name: str, fmt: Format, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": to_quantization_config({"a": fmt})}))
    assert stored_in(tmp_path).format == name


def test_half_the_bytes_in_bfloat16() -> None:
    for config in SHAPES.values():
        assert 2 * Stored("bfloat16").total(config) == Stored().total(config)


def test_the_largest_phase_is_the_peak() -> None:
    memory = Memory({"loading": {"weights": 5}, "running": {"weights": 3, "cache": 4}})
    assert (memory.peak, memory.total) == ("running", 7)


def test_constants_that_are_repeated_are_equal() -> None:
    assert (memory_module.ALONE, memory_module.SCORED) == (attend.ALONE, attend.SCORED)
    assert memory_module._PART == reference.EXACT_INPUTS


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
