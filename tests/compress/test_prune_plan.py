"""In what steps a model gets smaller, and what is refused before anything is computed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import SHAPES

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.compress.prune_plan import PruneConfig, schedule
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import size_of


def hollow(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def steps(name: str, **asked: Any) -> list[dict[Any, int]]:
    return schedule(hollow(SHAPES[name]), PruneConfig(**asked))


def wide(width: int, heads: int = 4) -> Decoder:
    shape = SHAPES["qwen3"].model_dump() | {"intermediate_size": width}
    shape["attention"] |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return hollow(ModelConfig.model_validate(shape))


def test_forty_percent_of_384_channels_in_steps_of_five() -> None:
    found = schedule(wide(384), PruneConfig(channels=0.4))
    assert [step["intermediate_size"] for step in found] == [365, 346, 326, 307, 288, 269, 250, 230, 224]
    assert schedule(wide(384), PruneConfig(channels=0.4, multiple=1))[-1] == {"intermediate_size": 230}
    assert schedule(wide(384), PruneConfig(channels=0.4, step_share=0.9)) == [{"intermediate_size": 224}]


@given(
    width=st.integers(8, 3000),
    heads=st.integers(2, 40),
    channels=st.floats(0.01, 0.9),
    share=st.floats(0.01, 0.9),
    multiple=st.sampled_from([1, 4, 32]),
    step=st.floats(0.005, 0.9),
)
def test_steps_are_small_and_end_where_they_should(
    width: int, heads: int, channels: float, share: float, multiple: int, step: float
) -> None:
    model = wide(width, heads)
    config = PruneConfig(channels=channels, heads=share, multiple=multiple, step_share=step)
    try:
        found = schedule(model, config)
    except ConfigError as error:
        assert "cuts none" in str(error) or "leaves none" in str(error)
        left = (width * (1 - channels) / multiple, width / multiple, heads * (1 - share))
        assert left[0] <= 0.51 or left[0] > left[1] - 1 or left[2] <= 0.51 or left[2] >= heads - 0.51
        return
    for size, asked, unit in (("intermediate_size", channels, multiple), ("num_key_value_heads", share, 1)):
        before = size_of(model.config, size)
        numbers = [before, *(sizes[size] for sizes in found)]
        assert abs(numbers[-1] - before * (1 - asked)) <= unit / 2 + 1e-6
        assert numbers[-1] % unit == 0
        assert numbers == sorted(numbers, reverse=True)
        assert max(one - other for one, other in pairwise(numbers)) <= math.ceil(step * before) + 1
    assert all(one != other for one, other in pairwise(found))
    assert len(found) <= math.ceil(0.95 / step) + 1 or multiple > 1


def test_experts_go_by_groups_and_every_width_goes_at_once() -> None:
    moe = SHAPES["deepseek-v3"].moe
    assert moe is not None
    grouped = SHAPES["deepseek-v3"].model_copy(update={"moe": moe.model_copy(update={"n_routed_experts": 16})})
    found = schedule(hollow(grouped), PruneConfig(experts=0.5, channels=0.5, multiple=4))
    assert [sizes["n_routed_experts"] for sizes in found][-1] == 8
    assert {sizes["n_routed_experts"] % 4 for sizes in found} == {0}
    assert found[-1] == {"intermediate_size": 20, "moe_intermediate_size": 8, "n_routed_experts": 8}
    assert steps("qwen2-moe", channels=0.5, multiple=4)[-1] == {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
    assert steps("qwen3", layers=0.34) == [{"num_hidden_layers": 2}]


def test_widths_that_are_not_used_are_not_asked_of() -> None:
    """The dense width of a mixture without dense layers describes nothing."""
    assert "intermediate_size" not in steps("qwen2-moe", channels=0.5, multiple=4)[-1]
    assert steps("llama", heads=0.5) == [{"num_key_value_heads": 1}]


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("llama", {"channels": 0.2, "multiple": 20}, r"0.2 of intermediate_size 40 in steps of 20 cuts none: raise it, or lower multiple"),
        ("llama", {"channels": 0.9, "multiple": 20}, r"channels: 0.9 of intermediate_size 40 in steps of 20 leaves none: lower it"),
        ("llama", {"heads": 0.1}, r"heads: 0.1 of num_key_value_heads 2 cuts none: raise it$"),
        ("llama", {"heads": 0.9}, r"heads: 0.9 of num_key_value_heads 2 leaves none: lower it$"),
        ("llama", {"layers": 0.9}, r"layers: 0.9 of num_hidden_layers 3 leaves none"),
        ("llama", {"experts": 0.5}, r"experts: this model has no experts: leave it out"),
        ("deepseek-v3", {"experts": 0.2}, r"experts: 0.2 of n_routed_experts 8 in steps of 4 cuts none: raise it$"),
        ("deepseek-v3", {"experts": 0.5}, r"n_group 4 leaves fewer than the two experts"),
        ("qwen3-moe", {"experts": 0.75}, r"num_experts_per_tok 3 is more than the 2 experts in reach"),
        ("llama-tied", {"heads": 0.25}, r"heads: 0.25 leaves 3 query heads; transformers takes only a llama whose heads divide"),
    ],
)
def test_what_can_not_be_is_refused_before_the_work(name: str, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        steps(name, **asked)


def test_layers_that_reach_differently_stay_where_prediction_layers_lean_on_the_first() -> None:
    shape = SHAPES["deepseek-v3-mtp"].model_dump() | {"reach": [{"kind": "window", "window": 5}, {"kind": "causal"}]}
    mixed = hollow(ModelConfig.model_validate(shape))
    with pytest.raises(ConfigError, match="prediction layers reach as the first: leave layers out"):
        schedule(mixed, PruneConfig(layers=0.34))
    assert schedule(mixed, PruneConfig(heads=0.5))[-1] == {"num_attention_heads": 2}
    assert steps("deepseek-v3-mtp", layers=0.34)[-1] == {"num_hidden_layers": 2}


def test_a_config_that_cuts_nothing_or_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is to be cut: set one of channels, heads, experts, layers above 0"):
        load(PruneConfig, {})
    with pytest.raises(ConfigError, match=r"less than or equal to 0\.9"):
        load(PruneConfig, {"channels": 0.95})
    with pytest.raises(ConfigError, match='did you mean "channels"'):
        load(PruneConfig, {"channel": 0.4})


def test_layers_are_rebuilt_unless_some_are_cut() -> None:
    assert PruneConfig(channels=0.4).rebuilding_steps > 0
    assert PruneConfig(channels=0.4, rebuild_steps=0).rebuilding_steps == 0
    assert PruneConfig(channels=0.4, layers=0.3).rebuilding_steps == 0
