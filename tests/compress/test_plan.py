"""From a budget to a policy: what COMPRESS makes of it is as large as was said, and no other assignment forecasts less damage."""

from __future__ import annotations

import itertools
import json
from itertools import chain
from pathlib import Path

import letter_line
import pytest
from filled import filled
from shapes import SHAPES
from texts import batch, documents

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError, TrainingError
from lineshaft.base.store import Store
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.plan import BudgetConfig, Measure, Plan, calibration, plan
from lineshaft.compress.stage import compress
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import Batch

FORMATS = ["int8", "int4-8", "int4"]


def rows_for(model: Decoder) -> list[Batch]:
    return [batch(documents(seed, [12, 9], model.config.vocab_size)) for seed in range(2)]


def made(shape: str, **asked: object) -> tuple[Decoder, Plan]:
    model = filled(SHAPES[shape], spread=0.15)
    return model, plan(model, rows_for(model), BudgetConfig.model_validate({"formats": FORMATS, **asked}))


@pytest.mark.parametrize("measure", ["kl", "fisher", "gradient"])
@pytest.mark.parametrize(("shape", "bits"), [("llama", 6.0), ("qwen3-moe", 5.6), ("llama-tied", 5.2)])
def test_the_policy_makes_a_model_of_just_these_bytes(shape: str, bits: float, measure: Measure) -> None:
    model, found = made(shape, bits=bits, measure=measure)
    done = compress(model, CompressConfig(policy=found.policy))
    coded = [model.linears()[name] for name in done]
    assert sorted(done) == sorted(name for unit in found.units.values() for name in unit.layers)
    assert found.bytes == sum(tensor.nbytes for linear in coded for tensor in linear.tensors().values())
    assert found.weights == sum(linear.in_features * linear.out_features for linear in coded)
    assert bits - 0.5 < found.bits == 8 * found.bytes / found.weights <= bits
    assert len({linear.format for linear in coded}) > 1


def test_of_all_assignments_within_the_budget_none_forecasts_less() -> None:
    _, found = made("llama", bits=6.0, skip=["lm_head", "model.layers.[12].*"])
    assert len(found.units) == 4
    within = []
    for names in itertools.product(FORMATS, repeat=4):
        chosen = list(zip(found.units.values(), names, strict=True))
        if all(name in unit.bytes for unit, name in chosen) and 8 * sum(unit.bytes[name] for unit, name in chosen) <= 6 * found.weights:
            within.append(sum(unit.damage[name] for unit, name in chosen))
    assert found.damage == pytest.approx(min(within), rel=1e-12)
    assert found.damage == pytest.approx(sum(unit.damage[unit.format] for unit in found.units.values()), rel=1e-12)


def test_more_bits_never_do_more_damage_and_enough_give_the_best_to_all() -> None:
    damages = [made("llama", bits=bits)[1].damage for bits in (5.0, 5.5, 6.5, 20)]
    assert damages == sorted(damages, reverse=True)
    assert set(made("llama", bits=20)[1].policy.values()) == {"int8"}


def test_prediction_layers_get_the_fewest_bytes_unless_they_are_skipped() -> None:
    """No answer depends on them."""
    _, found = made("deepseek-v3-mtp", bits=20.0, tied="layer", formats=["int8", "int4"])
    assert found.policy["model.layers.3.eh_proj"] == "int4"
    assert found.policy["model.layers.2.mlp.shared_experts.down_proj"] == "int8"
    skip = ["lm_head", "model.layers.[34].*"]
    _, found = made("deepseek-v3-mtp", bits=20.0, tied="layer", formats=["int8", "int4"], skip=skip)
    assert not [pattern for pattern in found.policy if ".layers.3." in pattern]


def test_it_is_written_and_read_and_the_same_again() -> None:
    _, found = made("qwen3-moe", bits=5.6)
    assert load(Plan, json.loads(found.model_dump_json())) == found
    assert made("qwen3-moe", bits=5.6)[1].model_dump_json() == found.model_dump_json()


def test_what_cannot_be_reached_is_told_with_what_can() -> None:
    with pytest.raises(ConfigError, match=r"4 bits a weight can't be reached: int8, int4-8, int4 take at least 4\.\d+"):
        made("llama", bits=4.0)
    with pytest.raises(ConfigError, match="skip leaves no layer"):
        made("llama", bits=6.0, skip=["*"])
    model = filled(SHAPES["llama"])
    with pytest.raises(ConfigError, match=r"rows of 257 tokens exceed the model's max_position_embeddings 256: lower row_tokens"):
        plan(model, [batch(documents(0, [257], 61))], BudgetConfig(bits=6.0))
    for wrong, told in ((["int5"], '"int5" is none'), ([], "at least one"), (["fp8"], '"fp8" is none')):
        with pytest.raises(ConfigError, match=told):
            load(BudgetConfig, {"bits": 5.0, "formats": wrong}, "budget")


def test_calibration_rows_lie_evenly_over_the_training_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    letters = letter_line.tokenizer(store)
    texts = letter_line.documents(1, 60)
    tokens = letter_line.tokens(store, letters, texts, letter_line.documents(2, 9))
    stream = list(chain.from_iterable(texts))
    rows = calibration(tokens, BudgetConfig(bits=5.0, rows=4, row_tokens=32))
    last = (len(stream) - 1) // 32 - 1
    firsts = [32 * at for at in (0, last // 3, 2 * last // 3, last)]
    assert [row.tokens_T.tolist() for row in rows] == [stream[first : first + 32] for first in firsts]
    assert len(calibration(tokens, BudgetConfig(bits=5.0, rows=10**6, row_tokens=32))) == last + 1
    with pytest.raises(TrainingError, match="too few for one row"):
        calibration(tokens, BudgetConfig(bits=5.0, row_tokens=10**5))
