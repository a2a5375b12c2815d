"""The evaluation stage end to end on tiny artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import letter_line
import pytest
import torch

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.engine.config import EngineConfig
from lineshaft.evaluate import stage
from lineshaft.evaluate.speed import Speed, SpeedConfig
from lineshaft.evaluate.stage import EVALUATE, EvaluateConfig
from lineshaft.model.adopt import ADOPT, AdoptConfig
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.ops.entries import entry_bytes
from lineshaft.ops.formats import Integer
from lineshaft.ops.isa import library
from lineshaft.records.report import read_report
from lineshaft.records.tokens import TokenStream

CONFIG = EvaluateConfig(
    sequence_tokens=16, max_tokens=800, speed=SpeedConfig(prompt_tokens=8, output_tokens=4, requests=4, batch=3), usd_per_hour=3.6
)
FAKE = Speed(load_seconds=0.5, peak_memory_bytes=7, first_token=[0.1, 0.3], latency=[0.4, 0.9], batch_seconds=2.0, threads=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""
    monkeypatch.setattr(stage, "measure", lambda *_: FAKE)


@pytest.mark.usefixtures("measured_here")
def test_two_runs_measure_other_times_and_end_with_the_same_digest(store: Store, parents: dict[str, Artifact], tmp_path: Path) -> None:
    first = EVALUATE(store, CONFIG, **parents)
    shutil.copytree(store.root, tmp_path / "copy")
    elsewhere = Store(tmp_path / "copy")
    shutil.rmtree(elsewhere.root / "artifacts" / first.id)
    second = EVALUATE(elsewhere, CONFIG, **{role: elsewhere.open(parent.id) for role, parent in parents.items()})
    assert second.manifest.digest == first.manifest.digest
    (report, measured), (again, measured_again) = read_report(store.open(first.id)), read_report(elsewhere.open(second.id))
    assert report == again
    assert measured.metrics != measured_again.metrics
    assert report.metrics.keys() | measured.metrics.keys() <= CATALOGUE.keys()
    assert measured.metrics["latency_p50_seconds"] <= measured.metrics["latency_p90_seconds"] <= measured.metrics["latency_p99_seconds"]
    assert all(value > 0 for value in measured.metrics.values())
    assert report.metrics["bits_per_byte_below_bigram"] == pytest.approx(
        1 - report.metrics["bits_per_byte"] / report.metrics["bigram_bits_per_byte"]
    )
    assert report.metrics["bits_per_weight"] == pytest.approx(32, rel=0.02)
    assert (report.subject, report.format) == (parents["checkpoint"].id, "dense")


def test_speeds_and_price_are_worked_out_from_what_was_measured() -> None:
    metrics, samples = stage._speed(FAKE, CONFIG)
    assert metrics["prefill_tokens_per_second"] == pytest.approx(8 / 0.2)
    assert metrics["decode_tokens_per_second"] == pytest.approx((3 / 0.3 + 3 / 0.6) / 2)
    assert metrics["batch_decode_tokens_per_second"] == pytest.approx(3 * 4 / 2.0)
    assert metrics["usd_per_million_tokens"] == pytest.approx(3.6 / 3600 / 6 * 1e6)
    assert samples == {"latency_seconds": [0.4, 0.9], "first_token_seconds": [0.1, 0.3]}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("stored", "asked", "size"), [("float32", "auto", 4), ("bfloat16", "auto", 2), ("float32", "bfloat16", 2)])
def test_cache_bytes_are_those_of_the_engine_that_serves(
    store: Store, parents: dict[str, Artifact], stored: str, asked: str, size: int
) -> None:
    model = load_checkpoint(parents["checkpoint"].root, dtype=getattr(torch, stored))
    with store.draft("checkpoint", stage="by_hand", version=1, config={"dtype": stored}) as draft:
        if isinstance(draft, Draft):
            save_checkpoint(model, draft.root, parents["checkpoint"].root)
    (made,) = (item.id for item in store.all() if item.config == {"dtype": stored})
    config = CONFIG.model_copy(update={"engine": EngineConfig.model_validate({"dtype": asked})})
    report, _ = read_report(EVALUATE(store, config, checkpoint=store.open(made), tokens=parents["tokens"]))
    attention = letter_line.TINY.attention
    assert attention.kind == "mla"
    assert report.metrics["kv_bytes_per_token"] == 2 * (attention.kv_lora_rank + attention.qk_rope_head_dim) * size


@pytest.mark.skipif(library() is None, reason="no native kernels here")
@pytest.mark.usefixtures("quick")
def test_a_cache_in_8_bits_is_counted_and_noted(store: Store, parents: dict[str, Artifact]) -> None:
    config = CONFIG.model_copy(update={"engine": EngineConfig(cache_dtype="int8")})
    report, _ = read_report(EVALUATE(store, config, **parents))
    attention = letter_line.TINY.attention
    assert attention.kind == "mla"
    assert report.metrics["kv_bytes_per_token"] == 2 * entry_bytes(attention.kv_lora_rank + attention.qk_rope_head_dim)
    assert "Speed is that of a cache in 8 bits; quality is computed without a cache." in report.notes
    refused = config.model_copy(update={"engine": EngineConfig(cache_dtype="int8", batch_invariant=False)})
    with pytest.raises(ConfigError, match="cache_dtype=int8"):
        EVALUATE(store, refused, **parents)


@pytest.mark.usefixtures("quick")
def test_quality_is_that_of_the_activations_that_serve(store: Store, parents: dict[str, Artifact], tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    model = load_checkpoint(parents["checkpoint"].root)
    for linear in model.linears().values():
        linear.recode(Integer(8))
    save_checkpoint(model, folder, parents["checkpoint"].root)
    coded = ADOPT(store, AdoptConfig(folder=str(folder)))
    losses = []
    for activations in ("auto", "int8"):
        config = CONFIG.model_copy(update={"engine": EngineConfig(activations=activations)})
        report, _ = read_report(EVALUATE(store, config, checkpoint=coded, tokens=parents["tokens"]))
        losses.append(report.metrics["loss_nats_per_token"])
        assert any("activations rounded to 8 bits" in note for note in report.notes) == (activations == "int8")
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_tokens_of_another_tokenizer_are_refused(store: Store, parents: dict[str, Artifact]) -> None:
    other = letter_line.tokenizer(store, version=2)
    strange = letter_line.tokens(store, other, letter_line.documents(1, 20), letter_line.documents(2, 20))
    with pytest.raises(ConfigError, match="was made with another tokenizer than"):
        EVALUATE(store, CONFIG, checkpoint=parents["checkpoint"], tokens=strange)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_tokens": 65}, "sequence_tokens is 65, more than the model's context of 64 tokens"),
        ({"speed": SpeedConfig(prompt_tokens=60, output_tokens=5)}, "output_tokens is 65, more than the model's context"),
    ],
)
def test_what_the_model_has_no_room_for_is_refused_before_the_scoring(
    store: Store, parents: dict[str, Artifact], changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        EVALUATE(store, CONFIG.model_copy(update=changes), **parents)


@pytest.mark.usefixtures("quick")
def test_a_model_smaller_than_its_tokenizer_is_refused(store: Store, parents: dict[str, Artifact]) -> None:
    model = load_checkpoint(parents["checkpoint"].root)
    small = type(model)(model.config.model_copy(update={"vocab_size": 20}))
    small.initialise(1)
    with store.draft("checkpoint", stage="by_hand", version=2, config={}) as draft:
        assert isinstance(draft, Draft)
        save_checkpoint(small, draft.root, parents["checkpoint"].root)
    (made,) = (item.id for item in store.all() if item.kind == "checkpoint" and (item.stage, item.version) == ("by_hand", 2))
    with pytest.raises(BadCheckpoint, match="the tokenizer has 28 tokens, the model's vocab_size is 20"):
        EVALUATE(store, CONFIG, checkpoint=store.open(made), tokens=parents["tokens"])


def test_held_out_text_shorter_than_a_prompt_is_refused(tmp_path: Path, parents: dict[str, Artifact]) -> None:
    store = Store(tmp_path)
    letters = letter_line.tokenizer(store)
    short = letter_line.tokens(store, letters, letter_line.documents(1, 20), [[0, 5, 6, 7, 1]])
    with pytest.raises(ConfigError, match=r"the held-out text has 5 tokens, fewer than speed.prompt_tokens 8"):
        stage._prompts(TokenStream(short, "heldout"), CONFIG.speed)


def test_prompts_are_spread_over_the_whole_text(parents: dict[str, Artifact]) -> None:
    stream = TokenStream(parents["tokens"], "heldout")
    prompts = stage._prompts(stream, SpeedConfig(prompt_tokens=8, requests=2, batch=4))
    assert [len(prompt) for prompt in prompts] == [8] * 4
    assert prompts[0] == stream.read(0, 8).tolist()
    assert prompts[2] == stream.read((len(stream) - 8) // 2, (len(stream) - 8) // 2 + 8).tolist()
