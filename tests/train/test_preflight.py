"""Training is refused before there are weights when it can't fit, and the change that is named makes it fit."""

from __future__ import annotations

from dataclasses import replace

import letter_line
import pytest

from lineshaft.base.errors import DoesNotFit
from lineshaft.base.store import Artifact, Store
from lineshaft.model import fit
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.train import stage
from lineshaft.train.preflight import COMPILED_BYTES, HOLES, Training, judge_training, train_memory
from lineshaft.train.stage import PRETRAIN, SMALL_DEEPSEEK

MODEL = ModelConfig.model_validate(SMALL_DEEPSEEK.model_dump() | {"vocab_size": 4096})
GIVEN = Training(MODEL, rows=8, sequence_tokens=256, precision="float32")


def test_weights_and_moments_are_counted_in_float32() -> None:
    phase = train_memory(GIVEN).phases["loss"]
    assert phase["weights"] == 4 * cost_of(MODEL).parameters
    assert phase["AdamW's two moments"] == 8 * cost_of(MODEL).parameters
    assert phase["loss, on the way back"] == 2 * 4 * 8 * 256 * 4096
    made = phase["activations of 2048 tokens"] + phase["loss, on the way back"]
    assert phase["holes in the heap"] == phase["weights"] + int(HOLES * made)


def test_the_way_back_ends_with_all_gradients() -> None:
    phases = list(train_memory(GIVEN).phases.values())
    assert phases[0]["gradients"] == 0
    assert phases[-1]["gradients"] == pytest.approx(4 * cost_of(MODEL).parameters, rel=0.01)


def test_gradients_that_are_added_up_stay_through_the_next_batch() -> None:
    assert train_memory(replace(GIVEN, accumulate=2)).phases["loss"]["gradients"] == 4 * cost_of(MODEL).parameters


def test_prediction_layers_cost_activations_and_logits_of_their_own() -> None:
    ahead = replace(GIVEN, model=MODEL.model_copy(update={"num_nextn_predict_layers": 1}))
    kept = [train_memory(given).phases["loss"]["activations of 2048 tokens"] for given in (GIVEN, ahead)]
    assert kept[1] - kept[0] > 2048 * 4 * 4096


@pytest.mark.parametrize(
    ("share", "change"),
    [
        (1.01, []),
        (0.9, ["rows=4 with loop.accumulate=2"]),
        (0.4, ["rows=1 with loop.accumulate=8"]),
        (0.35, ["rows=2 with loop.accumulate=4", "sequence_tokens="]),
        (0.01, []),
    ],
)
def test_the_smallest_change_is_named_and_fits(share: float, change: list[str]) -> None:
    own = judge_training(GIVEN, 1 << 40).own
    room = own + int(share * train_memory(GIVEN).total)
    verdict = judge_training(GIVEN, room)
    assert verdict.fits == (share > 1)
    assert [told[: len(start)] for told, start in zip(verdict.change, change, strict=True)] == change


def test_experts_in_bfloat16_make_room_for_products_of_every_shape() -> None:
    plain, dense = train_memory(GIVEN), train_memory(replace(GIVEN, precision="bfloat16"))
    assert COMPILED_BYTES not in plain.phases["loss"].values()
    assert COMPILED_BYTES in dense.phases["loss"].values()


def test_the_stage_refuses_before_it_makes_a_model(line: tuple[Store, dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(stage, "Decoder", lambda config: pytest.fail("a model was made"))
    before = [item.id for item in store.all()]
    with pytest.raises(DoesNotFit, match="train: needs"):
        PRETRAIN(store, letter_line.config(rows=4), **parents)
    assert [item.id for item in store.all()] == before
