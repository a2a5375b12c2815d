"""A request's answer is the same bits alone and in any company: ids, log-probabilities, embeddings (row E15)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch

from lineshaft.engine import runner
from lineshaft.engine.cache import page_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.warm import told, warm_up
from lineshaft.model.decoder import Decoder
from lineshaft.ops import steady, table
from lineshaft.ops.formats import Integer
from lineshaft.ops.isa import library
from lineshaft.sched.request import Ask, Emitted, Event, Sampling

Tiny = Callable[..., Decoder]
VOCABULARY = 61
REQUESTS = 200
NEEDS_NATIVE = pytest.mark.skipif(library() is None, reason="no native kernels here")
FAMILIES = ["deepseek_v3", "llama", "qwen3_moe", "deepseek_v32", "mistral"]


@dataclass
class Told:
    """What one request was told."""

    tokens: list[int] = field(default_factory=list)
    chances: list[object] = field(default_factory=list)


def engine_of(model: Decoder, pages: int, held: str = "auto", **limits: object) -> Engine:
    """`held`: as what its cache is."""
    dtype = torch.int8 if held == "int8" else next(model.parameters()).dtype
    size = pages * page_bytes(model.config, 4, dtype)
    config = EngineConfig.model_validate({"page_tokens": 4, "cache_bytes": size, "cache_dtype": held, "scheduler": limits})
    return Engine(model, config, clock=lambda: 0.0)


def asks() -> list[Ask]:
    """Random lengths and settings; many begin alike."""
    luck = random.Random(11)
    beginnings = [[luck.randrange(VOCABULARY) for _ in range(30)] for _ in range(4)]
    made = []
    for seed in range(REQUESTS):
        own = [luck.randrange(VOCABULARY) for _ in range(luck.randint(1, 20))]
        prompt = luck.choice(beginnings)[: luck.randint(0, 30)] + own
        sampling = Sampling(
            max_tokens=luck.randint(1, 20),
            temperature=luck.choice([0.0, 0.7, 1.5]),
            top_p=luck.choice([1.0, 0.9]),
            top_k=luck.choice([0, 20]),
            repetition_penalty=luck.choice([1.0, 1.3]),
            presence_penalty=luck.choice([0.0, 0.5]),
            logit_bias=luck.choice([{}, {3: 2.0}]),
            seed=seed,
            logprobs=luck.choice([0, 3]),
            ignore_eos=True,
        )
        made.append(Ask(prompt, sampling, priority=luck.choice([0, 0, 0, 1]), task=luck.choice(["generate", "generate", "score"])))
    return made


def take(told: dict[int, Told], events: list[Event]) -> None:
    for event in events:
        if isinstance(event, Emitted):
            told.setdefault(event.request, Told()).tokens.append(event.token)
            told[event.request].chances.append(event.score)


def alone(model: Decoder, held: str = "auto") -> Callable[[Ask], Told]:
    """Answers one request at a time in one go: nobody else is in the engine, and it has no cache to find anything in."""
    engine = engine_of(model, 60, held, prefix_cache=False)

    def answer(ask: Ask) -> Told:
        told: dict[int, Told] = {}
        (number,) = engine.submit(ask)
        while not engine.idle:
            take(told, list(engine.step()))
        return told[number]

    return answer


def differing(model: Decoder, made: list[Ask]) -> Iterator[int]:
    """Numbers of the requests that are told something else in company than alone."""
    heard, _ = in_company(model, made, set())
    answer = alone(model)
    yield from (number for number, ask in enumerate(made, 1) if heard[number] != answer(ask))


def in_company(model: Decoder, made: list[Ask], cancelled: set[int], held: str = "auto") -> tuple[dict[int, Told], Engine]:
    """Staggered, chunked, preempted, from the cache; some are cancelled on the way."""
    luck = random.Random(5)
    engine, told = engine_of(model, 110, held, max_batch=32, step_tokens=37), {}
    left = list(made)[::-1]
    while left or not engine.idle:
        for _ in range(luck.randint(0, 4)):
            if left and len(engine.scheduler.waiting) < 20:
                (number,) = engine.submit(left.pop())
                assert number == len(made) - len(left)
        take(told, list(engine.step()))
        for number in list(told):
            if number in cancelled and len(told[number].tokens) >= 2:
                engine.cancel(number)
        engine.scheduler.check()
    assert all(pool.available == pool.pages for pool in engine.scheduler.pools)
    return told, engine


FEWER = 70
"""Requests that are still enough for hits in the cache and for preemptions."""


def same(family: str, dtype: torch.dtype, held: str = "auto", count: int = FEWER, slow: bool = False) -> object:
    marks = [*([NEEDS_NATIVE] if held == "int8" else []), *([pytest.mark.slow] if slow else [])]
    return pytest.param(family, dtype, held, count, marks=marks, id=f"{family}-{dtype}-{held}-{count}".replace("torch.", ""))


FULL = [("llama", torch.float32, "auto"), ("qwen3_moe", torch.float32, "auto"), ("deepseek_v3", torch.bfloat16, "int8")]
"""Families, types and caches that are unlike each other. The others differ from them in one thing each."""
OTHERS = [
    ("deepseek_v3", torch.float32, "auto"),
    ("mistral", torch.float32, "auto"),
    ("llama", torch.bfloat16, "auto"),
    ("deepseek_v3", torch.bfloat16, "auto"),
    ("qwen3_moe", torch.bfloat16, "auto"),
    ("llama", torch.float32, "int8"),
    ("llama", torch.bfloat16, "int8"),
    ("mistral", torch.bfloat16, "int8"),
    ("deepseek_v3", torch.float32, "int8"),
    ("deepseek_v32", torch.float32, "auto"),
    ("deepseek_v32", torch.bfloat16, "auto"),
]


@pytest.mark.parametrize(
    ("family", "dtype", "held", "count"),
    [
        *(same(*case, count=REQUESTS) for case in FULL),
        *(same(*case) for case in OTHERS),
        *(same(*case, count=REQUESTS, slow=True) for case in OTHERS),
    ],
)
def test_staggered_requests_get_the_bits_that_each_gets_alone(tiny: Tiny, family: str, dtype: torch.dtype, held: str, count: int) -> None:
    model, made = tiny(family).to(dtype), asks()[:count]
    cancelled = set(range(5, count, 17))
    heard, engine = in_company(model, made, cancelled, held)
    load, answer = engine.load_now(), alone(model, held)
    assert load.prefix_hit_tokens > 100
    assert load.preemptions > 0 or all(group.forgets for group in engine.scheduler.groups)
    for number, ask in enumerate(made, 1):
        wanted = answer(ask)
        if number % 20 == 0:  # requests before it leave nothing behind: an engine of its own answers the same
            assert alone(model, held)(ask) == wanted
        if number in cancelled:
            length = len(heard[number].tokens)
            wanted = Told(wanted.tokens[:length], wanted.chances[:length])
        assert heard[number] == wanted, f"request {number} of {family}"


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "held"), [*product(["deepseek_v3", "llama", "qwen3_moe"], ["auto", "int8"]), ("deepseek_v32", "auto")]
)
def test_nothing_of_pytorch_stands_between_the_kernels_of_a_step(tiny: Tiny, family: str, dtype: torch.dtype, held: str) -> None:
    step = engine_of(tiny(family).to(dtype), 60, held).runner.native
    assert step is not None
    assert step.told().startswith("steps are recorded"), step.obstacle


@pytest.mark.usefixtures("pytorch_alone")
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_so_do_they_without_native_kernels(tiny: Tiny, family: str) -> None:
    assert list(differing(tiny(family), asks()[:32])) == []


@pytest.mark.usefixtures("pytorch_alone")
@pytest.mark.parametrize("planted", ["products of as many rows as there are", "keys in blocks that hang on the length"])
def test_the_comparison_finds_a_planted_bug(tiny: Tiny, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted == "products of as many rows as there are":
        by_shape(monkeypatch)
    else:
        monkeypatch.setattr(steady, "_attended", _whole_softmax)
    _differs(tiny("llama"))


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("family", "op"),
    [
        ("llama", "packed_linear"),
        ("llama", "packed_linears"),
        ("llama", "packed_swiglu"),
        ("llama", "paged_attention"),
        ("deepseek_v3", "packed_by_head"),
        ("qwen3_moe", "experts"),
    ],
)
def test_the_comparison_finds_a_planted_bug_in_a_native_kernel(tiny: Tiny, family: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "NATIVE", {**table.NATIVE, op: table.REFERENCE[op]})  # adds up by shape, as PyTorch does
    _differs(tiny(family))


def by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's libraries choose the order of a product by the number of its rows."""
    monkeypatch.setattr(steady, "_by_rows", lambda x_TI, product: product(x_TI))
    monkeypatch.setattr(runner, "ROWS", 1)


def _differs(model: Decoder) -> None:
    assert any(differing(model, asks()[:60]))


@pytest.mark.parametrize("family", FAMILIES)
def test_warming_up_finds_the_same_bits_and_leaves_nothing_behind(tiny: Tiny, family: str) -> None:
    engine = engine_of(tiny(family), 60)
    before = engine.load_now()
    assert warm_up(engine) is True
    assert engine.load_now() == before
    assert engine.idle


@pytest.mark.parametrize(
    "fmt", [Integer(4, 8, symmetric=False), Integer(8, packing="int-quantized", activations="int8"), Integer(4, 8, activations="int8")]
)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_integer_weights_keep_the_bits(tiny: Tiny, family: str, fmt: Integer) -> None:
    model, made = tiny(family), asks()[:40]
    for linear in model.linears().values():
        if linear.in_features % 8 == 0:
            linear.recode(fmt)
    assert warm_up(engine_of(model, 60)) is True
    assert list(differing(model, made)) == []


@pytest.mark.usefixtures("pytorch_alone")
def test_warming_up_finds_a_machine_whose_library_adds_up_by_shape(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    by_shape(monkeypatch)
    assert warm_up(engine_of(tiny("llama"), 60)) is False


def test_an_engine_that_promises_nothing_says_so(tiny: Tiny) -> None:
    engine = Engine(tiny("llama"), EngineConfig(batch_invariant=False))
    assert warm_up(engine) is None
    assert "may depend" in told(None)


def _whole_softmax(q_XRD: torch.Tensor, k_XSD: torch.Tensor, v_XSV: torch.Tensor, seen_NMS: torch.Tensor) -> torch.Tensor:
    """Attention as one writes it down: the keys of the longest are one sum, and so are those of the shorter ones beside it."""
    sets, rows, _ = q_XRD.shape
    tiles, queries, keys = seen_NMS.shape
    seen = seen_NMS[:, None, :, None].expand(tiles, sets // tiles, queries, rows // queries, keys).reshape(sets, rows, keys)
    used = seen.any(1).any(0)
    scores = (q_XRD @ k_XSD[:, used].transpose(1, 2)).masked_fill(~seen[..., used], -torch.inf)
    return scores.softmax(-1) @ v_XSV[:, used]
