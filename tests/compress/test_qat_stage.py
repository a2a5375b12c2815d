"""Quantisation-aware training as a stage: what it writes was trained, what it says is true, and it goes on after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letter_line
import planted
import pytest
import torch
from safetensors.torch import load_file, save_file

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, BrokenContract, ConfigError, DoesNotFit, LineshaftError
from lineshaft.base.store import Artifact, Store
from lineshaft.compress import qat, qat_stage
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.qat_preflight import qat_memory
from lineshaft.compress.qat_stage import QAT, QatConfig, heldout_loss
from lineshaft.compress.stage import COMPRESS
from lineshaft.model import fit
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.records.tokens import TokenStream
from lineshaft.train import loop
from lineshaft.train.batches import Batch
from lineshaft.train.objective import Loss, NextToken
from lineshaft.train.preflight import Training, train_memory
from lineshaft.train.stage import PRETRAIN

Line = tuple[Store, Artifact, Artifact]
PLAIN = NextToken.__call__


@pytest.fixture(autouse=True)
def _less_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat_stage, "MEASURED_TOKENS", 200)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a dense checkpoint of two layers of latent attention, one of them with experts, and its tokens."""
    store, parents = letter_line.parents(tmp_path_factory.mktemp("line") / "given")
    PRETRAIN(store, letter_line.config(steps=40), **parents)
    return store.root


@pytest.fixture(scope="module")
def line(given: Path) -> Line:
    """What is in a copy of that store, in which runs meet those of other tests."""
    return opened(shutil.copytree(given, given.with_name("shared")))


def opened(folder: Path) -> Line:
    store, parents = letter_line.parents(folder)
    return store, PRETRAIN(store, letter_line.config(steps=40), **parents), parents["tokens"]  # which is there already


def config(**changes: Any) -> QatConfig:
    same = letter_line.config(**{name: changes.pop(name) for name in list(changes) if name in loop.LoopConfig.model_fields})
    return QatConfig.model_validate(same.model_dump(exclude={"model"}) | changes)


def run(line: Line, **changes: Any) -> Artifact:
    store, dense, tokens = line
    return QAT(store, config(**changes), checkpoint=dense, tokens=tokens)


def test_the_result_is_a_compressed_checkpoint_and_its_facts_are_true(line: Line) -> None:
    made, facts = run(line), run(line).manifest.facts
    model, dense = load_checkpoint(made.root), load_checkpoint(line[1].root)
    formats = {name: linear.format for name, linear in model.linears().items()}
    assert formats.pop("lm_head") == DENSE
    assert set(formats.values()) == {Integer(4)}
    assert {name.split(".")[3] for name in formats} == {"self_attn", "mlp"}
    assert facts["layers"] == len(formats)
    assert facts["format"] == "int4, one scale a channel"
    assert facts["parameters"] == line[1].manifest.facts["parameters"]
    heldout = TokenStream(line[2], "heldout")
    assert facts["heldout_loss_source"] == heldout_loss(dense, heldout, config())
    assert facts["heldout_loss_after"] == heldout_loss(model, heldout, config()) < facts["heldout_loss_before"]
    assert facts["tokens"] == 12 * 32
    history = [json.loads(entry) for entry in made.path("history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10, 12]
    assert history[-1]["loss"] == facts["final_loss"]


def test_each_group_of_a_4_bit_layer_has_at_most_16_weights_that_differ(line: Line) -> None:
    model = load_checkpoint(run(line).root)
    for linear in model.linears().values():
        if linear.format != DENSE:
            assert max(len(row.unique()) for row in linear.dense_weight(torch.float32)) <= 16


def test_what_is_not_compressed_was_trained_along(line: Line) -> None:
    made, dense = load_checkpoint(run(line).root).state_dict(), load_checkpoint(line[1].root).state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"):
        assert made[name].dtype == torch.float32
        assert not torch.equal(made[name], dense[name])


POLICY = {"format": "int8", "policy": {"*.self_attn.*": "int4-8", "*.mlp.*": "int8-8-a8", "*.down_proj": "int4-zeros", "*.o_proj": "dense"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "int8"},
        {"group": 8},
        {"symmetric": False, "group": 8, "ranges": "minmax"},
        {"format": "int8", "activations": "int8"},
        {"activations": "int8", "group": 8, "skip": []},
        {"precision": "bfloat16", "activations": "int8"},
        POLICY,
    ],
    ids=str,
)
def test_every_form_is_trained_and_written_as_it_was_asked_for(line: Line, changes: dict[str, Any]) -> None:
    made = run(line, **changes)
    wanted = config(**changes).compression
    formats = {name: linear.format for name, linear in load_checkpoint(made.root).linears().items()}
    assert formats == {name: wanted.coding_of(name) for name in formats}
    assert made.manifest.facts["heldout_loss_after"] < made.manifest.facts["heldout_loss_before"]


@pytest.mark.parametrize(("policy", "told"), [({"*.experts.2.*": "int8"}, True), ({"*.self_attn.*": "int8"}, False)])
def test_experts_in_several_formats_are_told_of(line: Line, policy: dict[str, str], told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run(line, policy=policy, steps=2, save_every=2)
    assert ("qat: routed experts have several formats (int4, one scale a channel, int8" in capsys.readouterr().err) == told


def test_the_model_that_trains_is_in_training_and_rounded(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, set[bool], bool]] = []

    def watching(self: NextToken, model: Decoder, batch: Batch) -> Loss:
        formats = {isinstance(linear.format, qat.FakeInteger) for name, linear in model.linears().items() if name != "lm_head"}
        seen.append((torch.is_grad_enabled(), formats, all(module.training for module in model.modules())))
        return PLAIN(self, model, batch)

    monkeypatch.setattr(NextToken, "__call__", watching)
    run(line, seed=5)
    trained = [entry for entry in seen if entry[0]]
    assert len(trained) == 12
    assert {(frozenset(formats), training) for _, formats, training in trained} == {(frozenset({True}), True)}
    assert {training for grads, _, training in seen if not grads} == {False}


def test_weights_and_ranges_move(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[dict[str, torch.Tensor]] = []
    plain = loop.run

    def watching(model: Decoder, *args: Any) -> Any:
        met.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        done = plain(model, *args)
        met.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return done

    monkeypatch.setattr(loop, "run", watching)
    run(line, symmetric=False, seed=6)
    before, after = met
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[-1] for name in before if "_proj" in name} == {"weight", "log_scale", "shift"}
    assert [name for name in still if not name.endswith("shift")] == []
    assert any(name.endswith("shift") for name in before.keys() - still)


def test_the_chat_contract_is_handed_on_and_one_that_was_lost_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    words = planted.with_template(store, "tokenizer", lost=False)
    tokens = letter_line.tokens(store, words, letter_line.documents(1, 20), letter_line.documents(2, 5))
    dense = PRETRAIN(store, letter_line.config(steps=1), tokenizer=words, tokens=tokens)
    made = QAT(store, config(steps=1), checkpoint=dense, tokens=tokens)
    assert made.manifest.facts["contract"] == words.manifest.facts["contract"]
    plain = qat_stage.save_checkpoint

    def careless(model: Decoder, folder: Path, tokenizer_from: Path) -> None:
        plain(model, folder, tokenizer_from)
        said = folder / "tokenizer_config.json"
        said.write_text(said.read_text().replace(r"{{ '\\n' }}", ""))

    monkeypatch.setattr(qat_stage, "save_checkpoint", careless)
    with pytest.raises(BrokenContract, match=planted.SHOWN):
        QAT(store, config(steps=1, seed=2), checkpoint=dense, tokens=tokens)


# -- resuming ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """What a test throws into a run."""


def stop_at_step(number: int, line: Line, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    calls = iter(range(1, 1000))

    def stopping(self: NextToken, model: Decoder, batch: Batch) -> Loss:
        if torch.is_grad_enabled() and next(calls) == number:
            raise Stopped
        return PLAIN(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(NextToken, "__call__", stopping)
        run(line, **changes)


@pytest.mark.parametrize("changes", [POLICY, {"symmetric": False, "activations": "int8", "sequence_tokens": 3}], ids=str)
def test_a_run_that_was_stopped_twice_ends_with_the_bytes_of_an_undisturbed_one(
    line: Line, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    again = opened(shutil.copytree(given, tmp_path / "again"))
    store = again[0]
    assert again[1].id == line[1].id
    stop_at_step(6, again, monkeypatch, **changes)
    stop_at_step(6, again, monkeypatch, **changes)  # the tenth
    (scratch,) = (store.root / "work").glob("*/scratch")
    assert sorted(path.name for path in scratch.iterdir()) == ["step-00000004", "step-00000008"]
    saved = load_file(scratch / "step-00000008" / "state.safetensors")
    assert any(name.startswith("exp_avg_sq.") and name.endswith("log_scale") for name in saved)
    resumed, undisturbed = run(again, **changes), run(line, **changes)
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.id == undisturbed.manifest.id


def test_a_killed_run_goes_on_to_the_same_bytes(line: Line, given: Path, tmp_path: Path) -> None:
    store, dense, tokens = opened(shutil.copytree(given, tmp_path / "again"))
    asked = [str(store.root), "10", config().model_dump_json(), dense.id, tokens.id]
    killed = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_qat.py"), *asked], capture_output=True, timeout=200, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (work,) = (path for path in (store.root / "work").iterdir())
    assert sorted(path.name for path in work.iterdir()) == ["payload", "scratch"]  # nothing had time to tidy up
    resumed = QAT(store, config(), checkpoint=dense, tokens=tokens)
    assert resumed.manifest.digest == run(line).manifest.digest
    assert resumed.manifest.aside["tokens_per_second"] * resumed.manifest.aside["train_seconds"] == pytest.approx(4 * 32)


# -- proof ------------------------------------------------------------------------------------------------------


def tampering(change: Callable[[dict[str, torch.Tensor], Path], None]) -> Callable[..., None]:
    plain = qat_stage.save_checkpoint

    def save(model: Decoder, folder: Path, tokenizer_from: Path) -> None:
        plain(model, folder, tokenizer_from)
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return save


LAYER = "model.layers.1.self_attn.kv_b_proj"


def flip(tensors: dict[str, torch.Tensor], _: Path) -> None:
    tensors[f"{LAYER}.weight_packed"][0, 0] ^= 1


def rescale(tensors: dict[str, torch.Tensor], _: Path) -> None:
    tensors[f"{LAYER}.weight_scale"][0, 0] *= 1.001


def shift(tensors: dict[str, torch.Tensor], _: Path) -> None:
    tensors["model.norm.weight"][0] += 1e-6


def rounding(_: dict[str, torch.Tensor], folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip, f"{LAYER} does not read back as it was trained: the disk, the writer or the encoder"),
        (rescale, f"{LAYER} does not read back as it was trained"),
        (shift, "model.norm.weight does not read back as it was trained"),
        (rounding, "reads back as int4, one scale a channel, int8 activations, trained was int4, one scale a channel: the writer"),
    ],
)
def test_what_does_not_read_back_as_it_was_trained_is_not_kept(
    line: Line, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], told: str
) -> None:
    before = {item.id for item in line[0].all()}
    monkeypatch.setattr(qat_stage, "save_checkpoint", tampering(change))
    with pytest.raises(BadCheckpoint, match=told):
        run(line, seed=7, steps=2, save_every=2)
    assert {item.id for item in line[0].all()} == before


def test_an_encoder_that_is_wrong_is_seen(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Integer.store
    monkeypatch.setattr(Integer, "store", lambda self, codes, scale, zero: plain(self, 15 - codes, scale, zero))
    with pytest.raises(BadCheckpoint, match="does not read back as it was trained"):
        run(line, seed=8, steps=2, save_every=2)


# -- refusals ---------------------------------------------------------------------------------------------------


def test_a_compressed_checkpoint_is_refused(line: Line) -> None:
    store, dense, tokens = line
    small = COMPRESS(store, CompressConfig(proof_nats=9.0), checkpoint=dense)
    with pytest.raises(
        ConfigError, match=r"qat: .* is stored as int8, one scale a channel already; .*the checkpoint that this one was made from"
    ):
        QAT(store, config(), checkpoint=small, tokens=tokens)


def test_tokens_of_another_tokenizer_are_refused(line: Line) -> None:
    store, dense, _ = line
    other = letter_line.tokens(store, letter_line.tokenizer(store, version=2), letter_line.documents(1, 9), letter_line.documents(2, 9))
    with pytest.raises(ConfigError, match=r"qat: .* was made with another tokenizer"):
        QAT(store, config(), checkpoint=dense, tokens=other)


def test_rows_longer_than_the_context_are_refused(line: Line) -> None:
    with pytest.raises(ConfigError, match="qat: sequence_tokens 128 exceeds"):
        run(line, sequence_tokens=128)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"format": "int8", "symmetric": False}, r"symmetric: int8 has no zero points"),
        ({"policy": {"a": "fp8"}}, r'policy: "a": "fp8" is none: formats are dense, int8'),
        ({"ranges": "kl"}, '"qat.ranges": '),
        ({"proof_nats": 1.0}, r'"qat\.proof_nats": unknown'),
    ],
)
def test_settings_that_mean_nothing_are_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(LineshaftError) as refused:
        load(QatConfig, table, "qat")
    assert refused.match(told)


def test_it_is_refused_before_weights_load_where_it_does_not_fit(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(fit, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(qat_stage, "load_checkpoint", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(DoesNotFit, match=r"qat: needs .* smallest change that fits"):
        run(line, seed=9)


def test_it_needs_more_memory_than_training(line: Line) -> None:
    model = load_checkpoint(line[1].root)
    given = Training(model.config, 2, 16, 1, "float32")
    plain, needs = train_memory(given), {name: qat_memory(given, (name,)) for name in ("int8", "int4-8", "int4-8-a8")}
    rounded = sum(4 * linear.in_features * linear.out_features for linear in model.linears().values())
    for phase in plain.phases:
        assert needs["int8"].phases[phase]["weights as rounded"] == rounded
        sizes = [plain.needs(phase), *(memory.needs(phase) for memory in needs.values())]
        assert sizes == sorted(set(sizes))
    layers = qat.begin(model, CompressConfig(format="int4", group=8, symmetric=False, skip=[]))
    ranges = sum(model.linears()[name].log_scale.numel() for name in layers)
    assert needs["int4-8"].phases["loss"]["ranges of weights"] == 48 * ranges


def test_without_held_out_text_losses_are_not_told_and_that_is_said(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    store, dense, tokens = line
    letters = store.open(tokens.manifest.parents["tokenizer"])
    bare = letter_line.tokens(store, letters, letter_line.documents(1, 60), [], version=2)
    made = QAT(store, config(), checkpoint=dense, tokens=bare)
    assert not any(name.startswith("heldout") for name in made.manifest.facts)
    assert capsys.readouterr().err.count("the tokens have no held-out text") == 1
