"""The ops that a model is said to run are those that it runs."""

from __future__ import annotations

import pytest
import torch
from shapes import SHAPES
from test_memory import batch

from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.decoder import Decoder
from lineshaft.model.operators import ops_used
from lineshaft.ops import table
from lineshaft.ops.formats import Integer
from lineshaft.ops.isa import library
from lineshaft.sched.request import Ask, Sampling
from lineshaft.train.objective import NextToken


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the ops that were looked up since."""
    names: set[str] = set()
    look_up = table.kernel

    def noted(op: str, x: torch.Tensor) -> table.Kernel:
        names.add(op)
        return look_up(op, x)

    monkeypatch.setattr(table, "kernel", noted)
    return names


@pytest.mark.parametrize("name", SHAPES)
def test_training_calls_no_other_op(name: str, called: set[str]) -> None:
    model = Decoder(SHAPES[name])
    model.initialise(1)
    for row, documents in ((24, 2), (256, 1)):
        NextToken()(model, batch(row, documents))
    assert called <= set(ops_used(SHAPES[name], "dense", "train"))
    assert set(ops_used(SHAPES[name], "dense", "train")) <= table.REFERENCE.keys()


@pytest.mark.skipif(library() is None, reason="no native kernels here")
@pytest.mark.parametrize("name", ["llama", "deepseek-v3"])
def test_serving_from_8_bit_pages_calls_these_ops(name: str, called: set[str]) -> None:
    model = Decoder(SHAPES[name])
    model.initialise(1)
    engine = Engine(model.eval().requires_grad_(False), EngineConfig(cache_dtype="int8"))
    engine.submit(Ask(list(range(40)), Sampling(max_tokens=3, ignore_eos=True)))
    while not engine.idle:
        engine.step()
    assert called == set(ops_used(SHAPES[name], "dense", "serve", native=True, pages8=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fmt", ["dense", "int8", "int8-a8"])
def test_serving_calls_these_ops(name: str, fmt: str, called: set[str]) -> None:
    model = Decoder(SHAPES[name])
    model.initialise(1)
    for linear in model.linears().values() if fmt != "dense" else ():
        if linear is not model.lm_head:
            linear.recode(Integer(8, activations="int8" if fmt == "int8-a8" else None))
    engine = Engine(model.eval().requires_grad_(False), EngineConfig())
    for length in (2, 40):  # within the choice of an indexer, and beyond
        engine.submit(Ask(list(range(length)), Sampling(max_tokens=3, ignore_eos=True)))
    while not engine.idle:
        engine.step()
    assert called == set(ops_used(SHAPES[name], fmt, "serve", library() is not None))
