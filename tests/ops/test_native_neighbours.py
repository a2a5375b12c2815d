"""Ops that take neighbours at once give the bits of those ops one after another, on every instruction set and any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, NEEDS_NATIVE, on, same_bits
from op_cases import DTYPES, arguments
from shapes import SHAPES
from torch import Tensor

from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model import ffn, fused, gqa, mla
from lineshaft.model.decoder import Decoder
from lineshaft.ops import native, native_linear, packing
from lineshaft.ops import table as ops
from lineshaft.ops.neighbours import MOST, Neighbours
from lineshaft.sched.request import Ask, Emitted, Sampling

pytestmark = NEEDS_NATIVE
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
THREADS = st.integers(1, 3)


def one_by_one(x: Tensor, weights: Neighbours) -> list[Tensor]:
    each = zip(weights.packed, weights.shapes, weights.biases, strict=True)
    return [native_linear.packed_linear(x, packed, shape, bias, weights.whole, False, weights.input_scale) for packed, shape, bias in each]


@each_isa
@each_dtype
@pytest.mark.parametrize("op", ["packed_linears", "packed_swiglu"])
@settings(max_examples=15)
@given(data=st.data())
def test_products_side_by_side_and_gate_with_up(op: str, isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    x, weights = data.draw(arguments(op, dtype))
    with on(isa, data.draw(THREADS)):
        got = getattr(native_linear, op)(x, weights)
    with on(isa):
        apart = one_by_one(x, weights)
        wanted = apart if op == "packed_linears" else [native.silu_mul(*apart)]
    found = list(got) if op == "packed_linears" else [got]
    assert all(same_bits(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@each_isa
@each_dtype
@settings(max_examples=15)
@given(data=st.data())
def test_a_sum(isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    *product, added = data.draw(arguments("packed_linear", dtype).filter(lambda found: found[-1] is not None))
    with on(isa, data.draw(THREADS)):
        got = native_linear.packed_linear(*product, added)
    with on(isa):
        assert same_bits(got, native.add(added, native_linear.packed_linear(*product)))


def test_of_many_tokens() -> None:
    """More than one tile of tokens, and groups that share their chunks of the inputs on tiles: 256 tokens by 1664 inputs."""
    luck = torch.Generator().manual_seed(1)
    x = torch.randn(300, 1664, generator=luck).bfloat16()
    made = [packing.pack_dense((torch.randn(520, 1664, generator=luck) / 40).bfloat16()) for _ in range(2)]
    both = Neighbours(tuple(packed for _, packed in made), tuple(shape for shape, _ in made), (None, None))
    with on(ISAS[-1], 2):
        gate, up = one_by_one(x, both)
        assert same_bits(native_linear.packed_swiglu(x, both), native.silu_mul(gate, up))
        assert all(same_bits(ours, alone) for ours, alone in zip(native_linear.packed_linears(x, both), (gate, up), strict=True))
        assert same_bits(native_linear.packed_linear(x, *reversed(made[0]), None, False, False, 0.0, up), native.add(up, gate))


def answers(name: str) -> list[tuple[int, Any]]:
    model = Decoder(SHAPES[name])
    model.initialise(3)
    engine = Engine(model.eval().requires_grad_(False).bfloat16(), EngineConfig())
    for length in (3, 70):
        engine.submit(Ask([1 + place % 60 for place in range(length)], Sampling(max_tokens=9, temperature=0, logprobs=1, ignore_eos=True)))
    events = [event for _ in iter(lambda: engine.idle, True) for event in engine.step()]
    return [(event.token, event.score) for event in events if isinstance(event, Emitted)]


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-moe", "deepseek-v2", "deepseek-v3-wide-values"])
def test_a_model_answers_with_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, seen = answers(name), []
    for home, part in ((ffn, "swiglu"), (gqa, "side_by_side"), (mla, "side_by_side"), (ffn, "added"), (gqa, "added"), (mla, "added")):
        monkeypatch.setattr(home, part, lambda *given, part=part: seen.append(part) or APART[part](*given))
    assert answers(name) == together
    assert len(together) == 18
    assert {"side_by_side", "added"} <= set(seen)


APART: dict[str, Callable[..., Any]] = {
    "swiglu": lambda x, gate, up: ops.silu_mul(gate(x), up(x)),
    "side_by_side": lambda x, *linears: [linear(x) for linear in linears],
    "added": lambda onto, linear, x: ops.add(onto, linear(x)),
}


def both(**changes: Any) -> Neighbours:
    shape, packed = packing.pack_dense(torch.ones(70, 48))
    return replace(Neighbours((packed, packed), (shape, shape), (None, None)), **changes)



@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native_linear.packed_linears(torch.ones(2, 44), both()), r"x is \[2, 44\]"),
        (lambda: native_linear.packed_linears(torch.ones(2, 48), both(biases=(None, torch.ones(64)))), r"the bias is \[64\]"),
        (lambda: native_linear.packed_linears(torch.ones(2, 48), Neighbours((), (), ())), f"at most {MOST}, alike"),
        (lambda: native_linear.packed_linears(torch.ones(2, 48), many(5)), f"at most {MOST}, alike"),
        (lambda: native_linear.packed_linears(torch.ones(2, 48), unlike()), f"at most {MOST}, alike"),
        (lambda: native_linear.packed_linears(torch.ones(2, 48), both(whole=True)), "need a weight of whole numbers"),
        (lambda: native_linear.packed_swiglu(torch.ones(2, 48), many(3)), "two weights of one shape"),
        (lambda: native_linear.packed_swiglu(torch.ones(2, 48).half(), both()), "not on torch.float16"),
        (lambda: added(torch.ones(2, 69)), r"\[2, 69\] torch.float32 and \[2, 70\]"),
        (lambda: added(torch.ones(2, 70).bfloat16()), "bfloat16 and"),
    ],
)
def test_they_refuse_what_they_cannot_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def many(count: int) -> Neighbours:
    one = both()
    return Neighbours(one.packed[:1] * count, one.shapes[:1] * count, (None,) * count)


def unlike() -> Neighbours:
    shape, packed = packing.pack_dense(torch.ones(70, 48).bfloat16())
    one = both()
    return Neighbours((one.packed[0], packed), (one.shapes[0], shape), (None, None))


def added(onto: Tensor) -> Tensor:
    shape, packed = packing.pack_dense(torch.ones(70, 48))
    return native_linear.packed_linear(torch.ones(2, 48), packed, shape, None, False, False, 0.0, onto)


def test_layers_that_are_not_packed_alike_go_one_by_one() -> None:
    """Of a model in two formats, or with layers that the kernels can't take."""
    model = Decoder(SHAPES["llama"])
    model.initialise(1)
    attention: Any = model.model.layers[0].self_attn
    assert fused._neighbours([attention.q_proj, attention.k_proj]) is None
    for linear in (attention.q_proj, attention.k_proj):
        linear.pack()
    assert fused._neighbours([attention.q_proj, attention.k_proj]) is not None
    assert fused._neighbours([attention.q_proj, attention.v_proj]) is None
    x = torch.randn(5, attention.q_proj.in_features)
    with ops.steady(), torch.inference_mode():
        q, v = fused.side_by_side(x, attention.q_proj, attention.v_proj)
        assert same_bits(q, attention.q_proj(x))
        assert same_bits(v, attention.v_proj(x))
        assert same_bits(fused.added(v, attention.v_proj, x), v + v)
