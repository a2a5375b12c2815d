"""The stage on a tiny model: what it writes loads, what it says is true, what can't be done is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import torch.nn.functional as F
from toys import logits_of, prompt, written_by_transformers

from lineshaft.base.config import load
from lineshaft.base.errors import BadCheckpoint, BrokenContract, ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress import stage
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.stage import COMPRESS, compress
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer

Make = Callable[..., Artifact]
TOKENIZER = b'{"not": "looked into here"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by_transformers("deepseek-groups", tmp_path_factory.mktemp("toy") / "hf").folder


@pytest.fixture
def dense(folder: Path, tmp_path: Path, make: Make) -> Artifact:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"tokenizer.json": TOKENIZER}
    return make(Store(tmp_path / "store"), files, kind="checkpoint")


def run(store_root: Path, source: Artifact, config: CompressConfig) -> Artifact:
    store = Store(store_root)
    with store.draft("checkpoint", stage="compress", version=1, config=config.model_dump(), parents={"checkpoint": source}) as draft:
        assert isinstance(draft, Draft)
        COMPRESS.build(draft, config)
        made = draft.root.parent.name
    return store.open(made)


@pytest.mark.parametrize("group", [None, 4])
def test_it_loads_and_its_facts_are_true(group: int | None, dense: Artifact, tmp_path: Path) -> None:
    made = run(tmp_path / "store", dense, CompressConfig(group=group))
    model, before, facts = load_checkpoint(made.root), load_checkpoint(dense.root), made.manifest.facts
    formats = {name: linear.format for name, linear in model.linears().items()}
    assert formats.pop("lm_head") == DENSE
    assert set(formats.values()) == {Integer(8, group)}
    assert facts["layers"] == len(formats)
    assert facts["format"] == Integer(8, group).describe()
    assert facts["quantised_share_of_fp32"] == quantised_share_of_fp32(model) < 0.5
    assert made.path("tokenizer.json").read_bytes() == TOKENIZER
    loss = [F.cross_entropy(logits_of(each, prompt(40))[:-1], torch.tensor(prompt(40)[1:])).item() for each in (before, model)]
    assert loss[1] == pytest.approx(loss[0], rel=0.01)


INT4 = {"format": "int4", "group": 8, "skip": ["lm_head", "*.q_b_proj", "*.kv_b_proj"]}
"""Layers of 20 and 12 inputs have no groups of 8."""


@pytest.mark.parametrize(
    ("wanted", "coding"),
    [
        (INT4, Integer(4, 8)),
        (INT4 | {"symmetric": False}, Integer(4, 8, symmetric=False)),
        (INT4 | {"activations": "int8"}, Integer(4, 8, activations="int8")),
        ({"activations": "int8"}, Integer(8, activations="int8", packing="int-quantized")),
        ({"activations": "int8", "group": 4}, Integer(8, 4, activations="int8", packing="int-quantized")),
    ],
)
def test_every_form_is_written_as_it_was_asked_for_and_rounds_to_nearest(
    wanted: dict[str, Any], coding: Integer, dense: Artifact, tmp_path: Path
) -> None:
    made = run(tmp_path / "store", dense, CompressConfig.model_validate(wanted))
    model, before = load_checkpoint(made.root), load_checkpoint(dense.root).linears()
    coded = {name: linear for name, linear in model.linears().items() if linear.format != DENSE}
    assert len(coded) == made.manifest.facts["layers"] > 10
    assert made.manifest.facts["format"] == coding.describe()
    for name, linear in coded.items():
        assert linear.format == coding
        scale_OG = linear.format.integers(linear.tensors()).scale_OG
        apart_OGI = (linear.dense_weight(torch.float32) - before[name].weight).view(*scale_OG.shape, -1).abs()
        assert (apart_OGI <= 0.52 * scale_OG[:, :, None]).all()  # half a step, and what FP16 takes from the scale: nothing is cut off


POLICY = {"*.mlp.*": "int4-8", "*.mlp.experts.2.*": "int8-4-a8", "lm_head": "int8", "*.self_attn.*": "int8-4", "*.o_proj": "dense"}


def test_a_policy_gives_each_layer_its_own_format_and_the_last_one_that_means_it_counts(dense: Artifact, tmp_path: Path) -> None:
    made = run(tmp_path / "store", dense, CompressConfig(policy=POLICY))
    linears = load_checkpoint(made.root).linears()
    for name, linear in linears.items():
        wanted: object = Integer(4, 8)
        if ".experts.2." in name:
            wanted = Integer(8, 4, activations="int8", packing="int-quantized")
        elif "self_attn" in name:
            wanted = DENSE if name.endswith("o_proj") else Integer(8, 4)
        assert linear.format == (Integer(8) if name == "lm_head" else wanted), name
    assert made.manifest.facts["format"].split("; ")[0] == Integer(4, 8).describe()
    assert made.manifest.facts["layers"] == sum(linear.format != DENSE for linear in linears.values())


@pytest.mark.parametrize(("policy", "warned"), [({"*.experts.2.*": "int8-4"}, True), ({"*.experts.*": "dense"}, False), ({}, False)])
def test_experts_in_several_formats_are_told_of(
    policy: dict[str, str], warned: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(load_checkpoint(folder), CompressConfig(policy=policy))
    assert ("routed experts have several formats" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("name", ["fp8", "int5", "int8-zeros", "int4-0", ""])
def test_a_policy_of_formats_that_there_are_not_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f'policy: "a": "{name}" is none: formats are dense, int8'):
        load(CompressConfig, {"policy": {"a": name}}, "compress")


def test_a_policy_that_means_no_layer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'policy: "\*\.atn\.\*" is no layer of this model'):
        compress(load_checkpoint(folder), CompressConfig(policy={"*.atn.*": "dense"}))


def test_zero_points_of_8_bits_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match="symmetric: int8 has no zero points"):
        load(CompressConfig, {"symmetric": False}, "compress")
    with pytest.raises(ConfigError, match=r"^symmetric: int8 has no zero points"):
        load(CompressConfig, {"symmetric": False})


def test_two_runs_write_the_same_bytes(dense: Artifact, tmp_path: Path) -> None:
    first = run(tmp_path / "store", dense, CompressConfig())
    second = run(tmp_path / "other", dense, CompressConfig())
    assert first.manifest.digest == second.manifest.digest


def names(model: Decoder) -> set[str]:
    return {name for name, linear in model.linears().items() if linear.format == DENSE}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head"], lambda name: name == "lm_head"),
        ([], lambda name: False),
        (["model.layers.0.*"], lambda name: name.startswith("model.layers.0.")),
        (["*.o_proj", "*experts*"], lambda name: "o_proj" in name or "experts" in name),
        (["lm_head", "model.layers.2.self_attn.kv_b_proj"], lambda name: name in ("lm_head", "model.layers.2.self_attn.kv_b_proj")),
    ],
)
def test_what_is_skipped_stays_as_it_was(skip: list[str], left: Callable[[str], bool], folder: Path) -> None:
    model, before = load_checkpoint(folder), load_checkpoint(folder)
    done = compress(model, CompressConfig(skip=skip))
    expected = {name for name in before.linears() if left(name)}
    assert names(model) == expected
    assert done == sorted(before.linears().keys() - expected)
    assert all(torch.equal(model.linears()[name].weight, before.linears()[name].weight) for name in expected)


def test_a_pattern_that_means_no_layer_is_refused(folder: Path) -> None:
    model = load_checkpoint(folder)
    with pytest.raises(ConfigError, match=r'skip: "lm_haed" is no layer of this model'):
        compress(model, CompressConfig(skip=["lm_haed"]))
    assert names(model) == set(model.linears())


def test_skipping_everything_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="leave no layer"):
        compress(load_checkpoint(folder), CompressConfig(skip=["*"]))


def test_a_tied_head_needs_no_skip(tmp_path: Path) -> None:
    model = load_checkpoint(written_by_transformers("llama-tied", tmp_path / "hf").folder)
    assert len(compress(model, CompressConfig())) == len(model.linears())


def test_a_layer_that_does_not_fit_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"compress: model.layers.0.self_attn.q_b_proj: int8: 20 inputs are not a multiple of 32.*skip"):
        compress(load_checkpoint(folder), CompressConfig(group=32))


def test_a_weight_that_is_not_a_number_is_named(folder: Path) -> None:
    model = load_checkpoint(folder)
    model.linears()["model.layers.1.self_attn.o_proj"].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"model.layers.1.self_attn.o_proj: a weight is not a number"):
        compress(model, CompressConfig())


def test_what_is_compressed_already_is_refused(dense: Artifact, tmp_path: Path) -> None:
    made = run(tmp_path / "store", dense, CompressConfig())
    with pytest.raises(ConfigError, match=r"stored as int8, one scale a channel already.*the checkpoint that this one was made from"):
        run(tmp_path / "store", made, CompressConfig(group=4))
    assert len(list(Store(tmp_path / "store").all())) == 2


def test_what_does_not_read_back_is_not_handed_on(dense: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = stage.save_checkpoint

    def forgetful(model: Decoder, folder: Path, tokenizer_from: Path) -> None:
        other = load_checkpoint(tokenizer_from)
        other.model.norm.weight += 1
        compress(other, CompressConfig())
        save(other, folder, tokenizer_from)

    monkeypatch.setattr(stage, "save_checkpoint", forgetful)
    with pytest.raises(BadCheckpoint, match=r"model.norm.weight is not what it was"):
        run(tmp_path / "store", dense, CompressConfig())
    assert len(list(Store(tmp_path / "store").all())) == 1


def test_the_source_is_left_alone(dense: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense.root, tmp_path / "copy"))
    run(tmp_path / "store", dense, CompressConfig())
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in dense.root.iterdir())


def test_the_chat_contract_is_handed_on_and_a_broken_one_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    kept = planted.with_template(store, "checkpoint", folder, lost=False)
    assert COMPRESS(store, CompressConfig(), checkpoint=kept).manifest.facts["contract"] == kept.manifest.facts["contract"]
    lost = planted.with_template(store, "checkpoint", folder, lost=True)
    monkeypatch.setattr(stage, "load_checkpoint", None)
    with pytest.raises(BrokenContract, match=f"{lost.id}: .*{planted.SHOWN}"):
        COMPRESS(store, CompressConfig(), checkpoint=lost)
