"""`engine.activations=int8`: the numbers of a checkpoint that says so itself, and a refusal where nothing could round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lineshaft.base.errors import ConfigError
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer
from lineshaft.sched.request import Ask, Emitted, Sampling
from lineshaft.serve.loading import loaded

Tiny = Callable[..., Decoder]
FAMILIES = ["llama", "qwen3_moe", "deepseek_v3"]
CODED = Integer(8, 4)
CONFIG = EngineConfig(cache_bytes=4 << 20)
ROUNDING = CONFIG.model_copy(update={"activations": "int8"})


def coded(model: Decoder, fmt: Integer = CODED, head: Integer = CODED) -> Decoder:
    for linear in model.linears().values():
        linear.recode(head if linear is model.lm_head else fmt)
    return model


def scores(engine: Engine) -> list[tuple[int, object]]:
    """Tokens of an answer and their log-probabilities, whose bits tell more."""
    engine.submit(Ask([5, 9, 2, 33, 7], Sampling(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3)))
    said: list[tuple[int, object]] = []
    while not engine.idle:
        said += [(event.token, event.score) for event in engine.step() if isinstance(event, Emitted)]
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_a_checkpoint_that_says_so_itself(family: str, tiny: Tiny) -> None:
    asked = scores(Engine(coded(tiny(family)), ROUNDING))
    assert asked == scores(Engine(coded(tiny(family), replace(CODED, activations="int8")), CONFIG))
    assert asked != scores(Engine(coded(tiny(family)), CONFIG))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_means_the_same_without_the_native_kernels(family: str, tiny: Tiny, pytorch_alone: None) -> None:
    asked = scores(Engine(coded(tiny(family)), ROUNDING))
    assert asked == scores(Engine(coded(tiny(family), replace(CODED, activations="int8")), CONFIG))


def test_the_model_that_was_given_keeps_its_formats_and_its_memory(tiny: Tiny) -> None:
    model = coded(tiny("llama"))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    Engine(model, ROUNDING)
    assert {linear.format for linear in model.linears().values()} == {CODED}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_the_output_projection_is_left_and_what_rounds_is_told(tiny: Tiny, tmp_path: Path) -> None:
    model = coded(tiny("llama"))
    save_checkpoint(model, tmp_path, tmp_path)
    _, ready = loaded(tmp_path, ROUNDING)
    count = len(model.linears())
    assert f"activations are rounded to 8 bits in {count - 1} of {count} products, as engine.activations says" in ready.told


@pytest.mark.parametrize(("stored", "dequantise"), [("dense", False), ("int8", True)])
def test_a_model_without_integer_weights_is_refused(stored: str, dequantise: bool, tiny: Tiny, tmp_path: Path) -> None:
    save_checkpoint(tiny("llama") if stored == "dense" else coded(tiny("llama")), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"engine\.activations=int8: no layer has integer weights"):
        Engine.load(tmp_path, ROUNDING.model_copy(update={"dequantise": dequantise}))
