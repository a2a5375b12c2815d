"""What packed_memory.py counts against what PyTorch really holds."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.layer import Layer
from lineshaft.model.linear import Linear
from lineshaft.model.memory import Stored
from lineshaft.model.packed_memory import PackedPass, readings
from lineshaft.model.rope import rotation
from lineshaft.ops import cpu
from lineshaft.ops.formats import Integer

GQA = {"kind": "gqa", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
MLA = {"kind": "mla", "num_attention_heads": 8, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 0}
ONE = MOE | {"num_experts_per_tok": 1}
SIZES = {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 768, "max_position_embeddings": 1024, "vocab_size": 256}
INDEXER = {"num_heads": 4, "head_dim": 32, "top_k": 64}
"""Wide enough that what attention needs for itself, about 100 KiB, is little beside it."""
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "attention": GQA},
    "narrow block": {"family": "llama", "attention": GQA, "intermediate_size": 64},
    "every head its own keys": {"family": "llama", "attention": GQA | {"num_key_value_heads": 8}, "intermediate_size": 64},
    "mixtral": {"family": "mixtral", "attention": GQA, "moe": MOE | {"scoring_func": "softmax", "n_shared_experts": 0}},
    "deepseek": {"family": "deepseek_v3", "attention": MLA | {"q_lora_rank": 96}, "moe": MOE},
    "deepseek, narrow experts": {"family": "deepseek_v3", "attention": MLA, "moe": ONE | {"moe_intermediate_size": 32}},
    "narrow values": {"family": "deepseek_v3", "attention": MLA | {"v_head_dim": 32}, "moe": ONE},
    "indexer": {"family": "deepseek_v32", "attention": MLA | {"q_lora_rank": 96, "indexer": INDEXER}, "moe": ONE},
}  # fmt: skip
ROW, ROWS = 256, 4


@pytest.fixture
def _as_where_bfloat16_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_worth_widening", lambda x: x.dtype == torch.bfloat16 and len(x) >= cpu.WIDE_ROWS)


@pytest.mark.usefixtures("_as_where_bfloat16_is_widened")
@pytest.mark.parametrize("documents", [1, 8], ids=["whole rows", "short documents"])
@pytest.mark.parametrize(
    "stored", [Stored(), Stored("bfloat16"), Stored("float32", "int8"), Stored("bfloat16", "int4-32")], ids=Stored.describe
)
@pytest.mark.parametrize("name", WIDE)
def test_a_pass_holds_what_is_counted(name: str, stored: Stored, documents: int) -> None:
    config = ModelConfig.model_validate({**SIZES, **WIDE[name]})
    model = Decoder(config)
    model.initialise(1)
    model.to(getattr(torch, stored.dtype))
    for linear in model.linears().values():
        if stored.format != "dense":
            linear.recode(Integer(8) if stored.format == "int8" else Integer(4, 32))
    counted = PackedPass(config, stored, ROW * ROWS, ROW).layer(0)
    # The dearest documents are counted: short ones, under a mask. Of those longer than top_k an indexer leaves less.
    least = 1 if documents == 8 else 2 if name == "indexer" else 1.2
    assert counted * 0.9 / least <= held(model, ROW // documents) <= counted * 1.03


@torch.no_grad()
def held(model: Decoder, length: int) -> int:
    """The most that a pass through the first layer holds beside what came in, by the allocator."""
    x_TI = torch.randn(ROW * ROWS, model.config.hidden_size, dtype=model.model.embed_tokens.weight.dtype)
    attend = PackedCausal(torch.arange(0, len(x_TI), length), len(x_TI), ROW)
    rotate, layer = rotation(model.config, torch.arange(len(x_TI)) % length), model.model.layers[0]
    layer(x_TI, rotate, attend)  # masks are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(x_TI, rotate, attend)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_readings_are_the_inputs_that_differ(name: str) -> None:
    config, model = SHAPES[name], Decoder(SHAPES[name])
    model.initialise(1)
    for index in range(config.num_hidden_layers):
        layer = model.model.layers[index]
        assert isinstance(layer, Layer)
        assert sorted(given_to(layer, config)) == sorted(item.inputs for item in readings(config, index) for _ in range(item.count))


def given_to(layer: Layer, config: ModelConfig) -> list[int]:
    """Widths of the tensors that linear layers are given, those once that follow each other as the very same."""
    widths, last = [], [None]

    def note(_: object, given: tuple[torch.Tensor]) -> None:
        if given[0] is not last[0]:
            widths.append(given[0].shape[-1])
            last[:] = given

    for linear in (module for module in layer.modules() if isinstance(module, Linear)):
        linear.register_forward_pre_hook(note)
    tokens = 4096  # so many that every expert has some
    starts = torch.arange(0, tokens, 64)
    layer(torch.randn(tokens, config.hidden_size), rotation(config, torch.arange(tokens) % 64), PackedCausal(starts, tokens, 64))
    return widths
