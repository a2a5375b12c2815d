"""The stage on a tiny teacher: students learn from it, a killed run ends the same, what can't be done is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import distilling
import letter_line
import planted
import pytest
import torch
import transformers
from distilling import config, shape
from safetensors.torch import load_file
from toys import agree, logits_of

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, BrokenContract, ConfigError, DoesNotFit, TrainingError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress import distil_stage
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.distil import MAPS, Distil, cut
from lineshaft.compress.distil_preflight import Distilling, distil_memory, judge_distilling
from lineshaft.compress.distil_stage import DISTIL, DistilConfig
from lineshaft.compress.stage import COMPRESS
from lineshaft.model import fit
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.memory import Stored
from lineshaft.train.batches import Batch
from lineshaft.train.objective import Loss
from lineshaft.train.preflight import Training, train_memory
from lineshaft.train.stage import HISTORY_FILE, PRETRAIN

Line = tuple[Store, dict[str, Artifact]]
SCRIPT = Path(__file__).with_name("killed_distilling.py")
STUDENT = shape(1, 8)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A store with tokens, and with a teacher of four layers that has learnt a little."""
    return taught(tmp_path_factory.mktemp("line"))


def taught(folder: Path) -> Line:
    store, parents = letter_line.parents(folder)
    learnt = letter_line.config(model=shape(4, 16), steps=60, rows=8, save_every=60, log_every=10)
    return store, {"checkpoint": PRETRAIN(store, learnt, **parents), "tokens": parents["tokens"]}


def test_a_student_learns_and_its_facts_are_true(line: Line) -> None:
    store, parents = line
    made = DISTIL(store, config(student=STUDENT, hidden_weight=0.1, steps=40, save_every=40), **parents)
    model, facts = load_checkpoint(store.open(made.id).root), made.manifest.facts
    assert model.config.model_dump() == load_checkpoint(parents["checkpoint"].root).config.model_dump() | STUDENT.model_dump()
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["teacher_parameters"] == parents["checkpoint"].manifest.facts["parameters"] > facts["parameters"]
    history = [json.loads(entry) for entry in made.path(HISTORY_FILE).read_text().splitlines()]
    assert history[-1]["loss"] == facts["final_loss"] < history[0]["loss"]
    assert (facts["tokens"], facts["format"]) == (40 * 32, "dense")
    assert "kept_layers" not in facts


def test_a_cut_student_begins_where_its_teacher_is(line: Line) -> None:
    store, parents = line
    slow = {"peak_lr": 1e-12, "weight_decay": 0.0}
    made = DISTIL(store, config(keep_layers=2, optimiser=slow), **parents)
    assert made.manifest.facts["kept_layers"] == [0, 3]
    begun, made_model = cut(load_checkpoint(parents["checkpoint"].root), 2), load_checkpoint(made.root)
    for name, tensor in begun.state_dict().items():
        torch.testing.assert_close(made_model.state_dict()[name], tensor, rtol=0, atol=1e-8)


def test_what_it_writes_transformers_loads_and_reads_the_same(line: Line) -> None:
    store, parents = line
    made = DISTIL(store, config(student=STUDENT, hidden_weight=1.0), **parents)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.root, dtype=torch.float32)
    text = letter_line.documents(5, 1)[0]
    with torch.inference_mode():
        assert agree(logits_of(load_checkpoint(made.root), text), theirs(torch.tensor([text])).logits[0])
    assert not [name for name in load_file(made.path("model.safetensors")) if MAPS in name]


def test_the_teacher_draws_the_student_towards_itself(line: Line) -> None:
    """With the teacher's chances alone, a student comes nearer to the teacher than one that sees the text alone."""
    store, parents = line
    same: dict[str, Any] = {"steps": 60, "save_every": 60, "log_every": 10, "rows": 8}
    taught_one = DISTIL(store, config(student=STUDENT, alpha=1.0, temperature=1.0, **same), **parents)
    tokenizer = store.open(parents["tokens"].manifest.parents["tokenizer"])
    alone = PRETRAIN(store, letter_line.config(model=STUDENT, **same), tokens=parents["tokens"], tokenizer=tokenizer)
    teacher = load_checkpoint(parents["checkpoint"].root)

    def apart(student: Artifact) -> float:
        model, total = load_checkpoint(student.root), 0.0
        for text in letter_line.documents(9, 20):
            p, q = (torch.log_softmax(logits_of(one, text).double(), -1) for one in (teacher, model))
            total += (p.exp() * (p - q)).sum().item()
        return total

    assert apart(taught_one) < 0.9 * apart(alone)


def test_equal_requests_give_equal_bytes_and_other_seeds_others(line: Line, tmp_path: Path) -> None:
    store, parents = line
    asked = config(student=STUDENT, hidden_weight=0.5)
    torch.manual_seed(1)
    first = DISTIL(store, asked, **parents)
    again, others = taught(tmp_path)
    torch.manual_seed(2)
    assert DISTIL(again, asked, **others).manifest.digest == first.manifest.digest
    assert DISTIL(store, asked.model_copy(update={"seed": 2}), **parents).manifest.digest != first.manifest.digest
    assert store.open(parents["checkpoint"].id).manifest.digest == others["checkpoint"].manifest.digest  # nothing wrote to the teacher


def test_every_part_of_the_config_changes_the_student(line: Line) -> None:
    store, parents = line
    asked = [{}, {"alpha": 0.9}, {"temperature": 4.0}, {"hidden_weight": 0.5}, {"alpha": 0.0, "hidden_weight": 0.5}]
    digests = {DISTIL(store, config(student=STUDENT, **changes), **parents).manifest.digest for changes in asked}
    digests.add(DISTIL(store, config(keep_layers=1), **parents).manifest.digest)
    digests.add(DISTIL(store, config(keep_layers=2), **parents).manifest.digest)
    assert len(digests) == 7


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    found_in = os.pathsep.join([str(Path(letter_line.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": found_in}
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    digest, steps = told["undisturbed"]
    assert steps == 8
    assert told["reruns"] == [[digest, 8], [digest, 6], [digest, 2]]


def test_a_state_holds_the_maps_and_their_moments(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    calls, plain = iter(range(1, 100)), Distil.__call__

    def stopping(self: Distil, *args: Any) -> Loss:
        if next(calls) == 6:
            raise TrainingError("stopped")
        return plain(self, *args)

    monkeypatch.setattr(Distil, "__call__", stopping)
    with pytest.raises(TrainingError, match="stopped"):
        DISTIL(store, config(student=shape(2, 8), hidden_weight=0.25, seed=8), **parents)
    (state,) = (store.root / "work").glob("*/scratch/step-00000004/state.safetensors")
    names = load_file(state).keys()
    assert {f"{part}.{MAPS}.{place}" for part in ("model", "exp_avg", "exp_avg_sq", "step") for place in (0, 1)} < names
    monkeypatch.setattr(Distil, "__call__", plain)
    assert DISTIL(store, config(student=shape(2, 8), hidden_weight=0.25, seed=8), **parents).manifest.facts["final_loss"] < 5


@pytest.mark.parametrize("asked", [{"student": STUDENT}, {"keep_layers": 2}])
def test_a_compressed_teacher_teaches(asked: dict[str, Any], line: Line) -> None:
    store, parents = line
    small = COMPRESS(store, CompressConfig(format="int4", proof_nats=5.0, group=8), checkpoint=parents["checkpoint"])
    made = DISTIL(store, config(**asked), checkpoint=small, tokens=parents["tokens"])
    assert {linear.format.describe() for linear in load_checkpoint(made.root).linears().values()} == {"dense"}
    assert made.manifest.digest != DISTIL(store, config(**asked), **parents).manifest.digest


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "student: set one of student"),
        ({"student": STUDENT.model_dump(), "keep_layers": 2}, "student: set one of student"),
        ({"keep_layers": 2, "alpha": 0.0}, "alpha: 0 with hidden_weight 0 leaves nothing to learn from the teacher"),
        ({"keep_layers": 2, "alpha": 1.1}, '"alpha"'),
        ({"keep_layers": 2, "temperature": 0.0}, '"temperature"'),
        ({"keep_layers": 2, "hidden_weight": -1.0}, '"hidden_weight"'),
        ({"keep_layers": 2, "temprature": 2.0}, 'did you mean "temperature"'),
    ],
)
def test_configs_that_mean_nothing_are_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(DistilConfig, asked)


def test_more_layers_than_the_teacher_has_can_not_be_kept(line: Line) -> None:
    with pytest.raises(ConfigError, match="distil: keep_layers: 5 of a teacher's 4 layers"):
        DISTIL.request(config(keep_layers=5), **line[1])


def test_tokens_of_another_tokenizer_are_refused(line: Line) -> None:
    store, parents = line
    other = letter_line.tokens(store, letter_line.tokenizer(store, version=2), letter_line.documents(1, 9), letter_line.documents(2, 9))
    with pytest.raises(ConfigError, match=r"distil: .* was made with another tokenizer than"):
        DISTIL(store, config(student=STUDENT), checkpoint=parents["checkpoint"], tokens=other)


def test_more_tokens_than_the_teacher_knows_are_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distil_stage.load_config
    monkeypatch.setattr(distil_stage, "load_config", lambda folder: plain(folder).model_copy(update={"vocab_size": 20}))
    with pytest.raises(BadCheckpoint, match="the tokenizer has 28 tokens, the teacher's vocab_size is 20"):
        DISTIL.request(config(student=STUDENT), **line[1])


def test_rows_longer_than_either_context_are_refused(line: Line) -> None:
    short, long = (shape(1).model_copy(update={"max_position_embeddings": most}) for most in (32, 128))
    with pytest.raises(ConfigError, match=r"distil, for the student: sequence_tokens 33 exceeds .* 32"):
        DISTIL.request(config(student=short, sequence_tokens=33), **line[1])
    with pytest.raises(ConfigError, match=r"distil, for the teacher: sequence_tokens 65 exceeds .* 64"):
        DISTIL.request(config(student=long, sequence_tokens=65), **line[1])


def test_a_broken_contract_is_told(line: Line, tmp_path: Path) -> None:
    store, parents = letter_line.parents(tmp_path)
    broken = planted.with_template(store, "checkpoint", line[1]["checkpoint"].root, lost=True)
    with pytest.raises(BrokenContract):
        distil_stage._build(Draft(tmp_path, {"checkpoint": broken, "tokens": parents["tokens"]}), config(keep_layers=2))


@pytest.mark.parametrize(("asked", "said"), [({"keep_layers": 4}, True), ({"student": shape(4, 24)}, True), ({"keep_layers": 3}, False)])
def test_a_student_that_is_no_smaller_is_allowed_but_said(
    asked: dict[str, Any], said: bool, line: Line, capfd: pytest.CaptureFixture[str]
) -> None:
    store, parents = line
    DISTIL(store, config(steps=4, seed=5, **asked), **parents)
    assert ("it will be no smaller" in capfd.readouterr().err) == said


def test_auto_precision_is_settled_before_the_key_is_taken_and_alike_on_all_processors(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        request = DISTIL.request(config(student=STUDENT, precision="auto"), **line[1])
        assert request.config.loop.precision == "float32"
        ids.add(request.id)
    assert len(ids) == 1


def test_a_loss_that_is_no_number_leaves_nothing(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    before = {item.id for item in store.all()}

    def infinite(self: Distil, model: Any, batch: Batch) -> Loss:
        loss = model.model.norm.weight.sum() * torch.inf
        return Loss(loss, loss)

    monkeypatch.setattr(Distil, "__call__", infinite)
    with pytest.raises(TrainingError, match="step 1 has a loss of inf"):
        DISTIL(store, config(student=STUDENT, seed=77), **parents)
    assert {item.id for item in store.all()} == before


# -- memory -------------------------------------------------------------------------------------------------------------

TEACHER = ModelConfig.model_validate(shape(8, 64).model_dump() | {"vocab_size": 512})
PLANNED = Distilling(
    Training(ModelConfig.model_validate(shape(2, 32).model_dump() | {"vocab_size": 512}), rows=8, sequence_tokens=256, precision="float32"),
    TEACHER,
    Stored(),
)


def test_the_teacher_is_counted_in_every_phase() -> None:
    alone, both = train_memory(PLANNED.student), distil_memory(PLANNED)
    weights = 4 * sum(parameter.numel() for parameter in distilling.model_of(shape(8, 64), 1).parameters())
    weights += 4 * 2 * 64 * (512 - letter_line.VOCABULARY)
    assert {terms["the teacher's weights"] for terms in both.phases.values()} == {weights}
    assert list(both.phases) == ["the teacher's pass", *alone.phases]
    assert all(both.needs(phase) >= alone.needs(phase) + weights for phase in alone.phases)


@pytest.mark.parametrize("change", [{"pairs": 2}, {"stored": Stored("bfloat16")}, {"stored": Stored(format="int8")}, {"chances": False}])
def test_what_is_asked_of_the_teacher_is_counted(change: dict[str, Any]) -> None:
    more = distil_memory(replace(PLANNED, **change)).total - distil_memory(PLANNED).total
    assert more > 0 if "pairs" in change else more < 0


def test_the_change_that_is_named_makes_it_fit() -> None:
    own, needed = judge_distilling(PLANNED, 1 << 40).own, distil_memory(PLANNED).total
    verdict = judge_distilling(PLANNED, own + int(0.8 * needed))
    assert verdict.change == ["rows=4 with loop.accumulate=2"]
    halved = replace(PLANNED, student=replace(PLANNED.student, rows=4, accumulate=2))
    assert distil_memory(halved).total <= 0.8 * needed


def test_the_stage_refuses_before_it_loads(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(distil_stage, "load_checkpoint", lambda folder: pytest.fail("weights were loaded"))
    monkeypatch.setattr(distil_stage, "Decoder", lambda config: pytest.fail("a model was made"))
    with pytest.raises(DoesNotFit, match="distil: needs"):
        DISTIL(store, config(student=STUDENT, rows=4, seed=99), **parents)
