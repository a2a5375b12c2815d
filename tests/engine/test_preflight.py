"""Serving is refused before weights load when it can't fit, and the change that is named makes it fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lineshaft.base.errors import DoesNotFit
from lineshaft.engine import preflight
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.pool import pool_of
from lineshaft.engine.preflight import Serving, check_room, judge_serving, serve_memory, with_cache
from lineshaft.model import fit
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.config import to_hf
from lineshaft.model.memory import Stored
from lineshaft.sched.admission import SchedulerConfig

LARGE = ModelConfig.model_validate(
    {
        "family": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "intermediate_size": 4096,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "attention": {"kind": "gqa", "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64},
    }
)


CACHE = EngineConfig(cache_bytes=512 << 20, scheduler=SchedulerConfig(max_batch=32))


def test_a_cache_of_no_given_size_takes_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "resident_memory_bytes", lambda: 200 << 20)
    rooms = [2 << 30, 3 << 30, 4 << 30]
    sizes = [with_cache(Serving(LARGE, Stored(), EngineConfig()), room).engine.cache_bytes for room in rooms]
    assert [late - early for early, late in pairwise(sizes)] == [512 << 20] * 2
    for room, size in zip(rooms, sizes, strict=True):
        verdict = judge_serving(Serving(LARGE, Stored(), EngineConfig(cache_bytes=size)), room)
        assert verdict.fits
        assert room - verdict.needs == pytest.approx(size, rel=0.02)


def test_a_cache_of_no_given_size_is_no_larger_than_could_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 1 << 40)
    settled = with_cache(Serving(LARGE, Stored(), EngineConfig())).engine
    assert pool_of(LARGE, settled, torch.float32).pages == [64 * 4096 // 16]


def test_weights_and_cache_are_exactly_those_of_the_engine(model: Decoder) -> None:
    config = EngineConfig(page_tokens=4, cache_bytes=40_000)
    engine = Engine(model, config)
    counted = serve_memory(Serving(model.config, Stored(), config)).phases["running"]
    assert counted["weights"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert counted["cache pages"] == sum(part.nbytes for parts in engine.cache.parts for part in parts)


def test_each_change_makes_it_smaller() -> None:
    given = Serving(LARGE, Stored(), CACHE)
    whole = serve_memory(given).total
    for ladder in (
        preflight._smaller_cache,
        preflight._smaller_batch,
        preflight._bfloat16,
        preflight._int8,
        preflight._shorter_context,
    ):
        sizes = [whole, *(serve_memory(changed).total for _, changed in ladder(given))]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < whole


@pytest.mark.parametrize(
    ("room", "change"),
    [
        (1750, []),
        (1450, ["engine.cache_bytes=268435456"]),
        (1250, ["engine.dtype=bfloat16"]),
        (1160, ["engine.dtype=bfloat16", "compress it to int8 first"]),
        (500, ["no option makes it fit"]),
    ],
)
def test_the_smallest_change_is_named(monkeypatch: pytest.MonkeyPatch, room: int, change: list[str]) -> None:
    monkeypatch.setattr(preflight, "resident_memory_bytes", lambda: 200 << 20)
    verdict = judge_serving(Serving(LARGE, Stored(), CACHE), room << 20)
    assert verdict.fits == (not change)
    assert [told[: len(start)] for told, start in zip(verdict.change or [verdict.advice], change, strict=False)] == change


def test_a_converted_checkpoint_is_held_twice_while_it_loads() -> None:
    stored = Stored("bfloat16", "int8")
    plain = serve_memory(Serving(LARGE, stored, EngineConfig()))
    cast = serve_memory(Serving(LARGE, stored, EngineConfig(dequantise=True)))
    assert plain.phases["loading"] == {"weights": stored.total(LARGE)}
    assert sum(cast.phases["loading"].values()) == stored.total(LARGE) + Stored("bfloat16").total(LARGE)


def test_fewer_active_experts_take_less(tiny: Callable[..., Decoder]) -> None:
    config = tiny("deepseek_v3").config
    wide = config.model_copy(update={"intermediate_size": 1})
    one, two = (serve_memory(Serving(wide, Stored(), EngineConfig(active_experts=count))).total for count in (1, 2))
    assert one < two


def test_a_folder_that_can_not_be_served_is_refused_before_any_weight_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(LARGE, "float32")))
    for module in (fit, preflight):
        monkeypatch.setattr(module, "resident_memory_bytes", lambda: 200 << 20)
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 1300 << 20)
    with pytest.raises(DoesNotFit, match=r"serve: needs .* of memory \(weights .*smallest change that fits: engine\.cache_bytes="):
        check_room(tmp_path, CACHE)
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 64 << 30)
    check_room(tmp_path, EngineConfig(scheduler=SchedulerConfig(max_batch=1)))
