"""The walk: it sees what a whole run of the model sees, and what is killed or damaged is made again to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_line import INT8, ROWS, line
from hypothesis import given
from hypothesis import strategies as st
from shapes import SHAPES
from torch import Tensor

from lineshaft.base.errors import ConfigError, TrainingError
from lineshaft.compress.calibrate import kept
from lineshaft.compress.calibrate.config import CalibrationConfig
from lineshaft.compress.calibrate.observe import SAMPLE, Inputs, Wanted
from lineshaft.compress.calibrate.parts import parts_of
from lineshaft.compress.calibrate.rows import Surroundings, calibration_rows
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder

SHORT: dict[str, dict[str, Any]] = {"gptq": INT8, "awq": INT8 | {"points": 6}, "smooth": ROWS}
"""What the steps are given: AWQ tries few scales, since its search is not what is tested here."""
BOTH = Wanted(gram=True, sample=True)
WALKED = ["llama-biased", "llama-tied", "mistral-mixture", "qwen3", "mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3-added"]
WALKED += ["deepseek-v3", "deepseek-v3-mtp", "deepseek-v32"]


def whole_runs(model: Decoder, rows: list[Surroundings]) -> dict[str, Tensor]:
    """Everything that came into each linear layer while the whole model ran, its prediction layers and head included."""
    taken: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, given: taken.setdefault(name, []).append(given[0].detach())

    hooks = [linear.register_forward_pre_hook(note(name)) for name, linear in model.linears().items()]
    for around in rows:
        batch = around.batch
        hidden_TI = model.hidden(batch.tokens_T, batch.positions_T, around.attend)
        model.logits(hidden_TI)
        next_T = around.next_T
        for depth in range(model.config.num_nextn_predict_layers):
            hidden_TI = model.draft(depth, hidden_TI, next_T, batch.positions_T, around.attend)
            next_T = torch.cat([next_T[1:], next_T[-1:]])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in taken.items()}


@pytest.mark.parametrize("shape", WALKED)
@torch.no_grad()
def test_every_layer_is_seen_with_what_a_whole_run_gives_it(shape: str, tmp_path: Path) -> None:
    made = line(tmp_path / "store", shape)
    model = load_checkpoint(made.checkpoint.root)
    rows = calibration_rows(made.tokens, CalibrationConfig(**ROWS), model.config)
    want = whole_runs(model, rows)
    hidden, seen = [model.model.embed_tokens(around.batch.tokens_T) for around in rows], {}
    for part in parts_of(model):
        seen |= part.observe(hidden, rows, part.linears(), BOTH, advance=True)
    assert seen.keys() == want.keys() == model.linears().keys() - {name for name in model.linears() if name not in want}
    for name, x_TI in want.items():
        assert seen[name].tokens == len(x_TI), name
        assert torch.equal(seen[name].largest_I, x_TI.abs().amax(0)), name
        torch.testing.assert_close(seen[name].mean_I, x_TI.abs().mean(0))
        torch.testing.assert_close(seen[name].gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen[name].sample_SI, x_TI), name


def test_each_part_has_its_own_modules_and_together_they_are_the_model(tmp_path: Path) -> None:
    for shape in WALKED:
        model = Decoder(SHAPES[shape])
        parts = parts_of(model)
        owned = [name for part in parts for name in model.state_dict() if part.holds(name)]
        assert sorted(owned) == sorted(set(model.state_dict()) - {"model.embed_tokens.weight"})
        joined = [junction.name for part in parts for junction in part.junctions()]
        assert joined == sorted(joined, key=[junction.name for junction in model.junctions()].index) or "mtp" in shape
        assert set(joined) == {junction.name for junction in model.junctions()}


@given(st.lists(st.integers(0, 900), min_size=1, max_size=6))
def test_a_sample_is_evenly_spaced_and_does_not_hang_on_the_calls(cuts: list[int]) -> None:
    tokens = torch.arange(float(sum(cuts)))[:, None]
    cut, whole = Inputs(1, BOTH), Inputs(1, BOTH)
    for part in tokens.split(cuts):
        cut.add(part)
    whole.add(tokens)
    sample = whole.sample_SI[:, 0]
    assert torch.equal(cut.sample_SI, whole.sample_SI)
    assert len(sample) <= SAMPLE
    assert len(sample) in (len(tokens), *range(SAMPLE // 2, SAMPLE + 1))
    if len(sample) > 1:
        assert sample[0] == 0 and len((sample[1:] - sample[:-1]).unique()) == 1
    assert torch.equal(cut.largest_I, whole.largest_I) and cut.tokens == whole.tokens == len(tokens)


def test_rows_are_chosen_by_the_seed_and_few_of_them_are_all_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = line(tmp_path / "store", "llama")
    config = load_checkpoint(made.checkpoint.root).config

    def texts(**given: Any) -> list[list[int]]:
        return [around.batch.tokens_T.tolist() for around in calibration_rows(made.tokens, CalibrationConfig(**ROWS | given), config)]

    assert texts() == texts() != texts(seed=1)
    assert [len(batch) for batch in texts()] == [64, 32]
    capsys.readouterr()
    assert sum(map(len, texts(sequences=100_000))) == 16 * (made.tokens.manifest.facts["train"]["tokens"] // 16)
    assert "100000 were asked for: all are used" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="too few for one row of 65536"):
        texts(sequence_tokens=1 << 16)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    made = line(tmp_path / "store", "llama")
    with pytest.raises(ConfigError, match="rows of 512 tokens exceed the model's max_position_embeddings 256"):
        made.compress("gptq")


# -- killed, damaged --------------------------------------------------------------------------------------------------


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    program = Path(__file__).parent / "killed_calibrating.py"
    helpers = os.pathsep.join(str(Path(__file__).parents[1] / folder) for folder in ("model", "train"))
    env = os.environ | {"PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, check=False, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["reruns"]) > 20
    assert {digest for digest, _ in told["reruns"]} == {told["undisturbed"][0]}
    parts = {count for _, count in told["reruns"]}
    assert parts == set(range(told["undisturbed"][1] + 1))  # from all over again to nothing left to do


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of what a run gives that nothing stops."""
    return line(tmp_path_factory.mktemp("undisturbed"), "llama").compress("awq", **SHORT["awq"]).manifest.digest


@pytest.mark.parametrize(("damaged", "again"), [("part-0001", 4), ("part-0002", 4), ("hidden-0002", 4), ("", 2)])
def test_a_damaged_part_is_named_and_made_again(
    damaged: str, again: int, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = line(tmp_path / "store", "llama")
    right, saved = kept.save, []

    def until_two(folder: Path, number: int, *given: Any) -> None:
        if number == 3 and not saved:
            raise KeyboardInterrupt
        right(folder, number, *given)

    monkeypatch.setattr(kept, "save", until_two)
    with pytest.raises(KeyboardInterrupt):
        made.compress("awq", **SHORT["awq"])
    if damaged:
        (file,) = made.store.root.glob(f"work/*/scratch/{damaged}/state.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")

    def counting(folder: Path, number: int, *given: Any) -> None:
        saved.append(number)
        right(folder, number, *given)

    monkeypatch.setattr(kept, "save", counting)
    digest = made.compress("awq", **SHORT["awq"]).manifest.digest
    assert (f"{damaged} is damaged" in capsys.readouterr().err) == bool(damaged)
    assert len(saved) == again
    assert digest == undisturbed


def test_parts_that_are_done_are_held_from_disk_and_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, held = line(tmp_path / "store", "llama"), []
    right = kept.tensors

    def look(folder: Path, number: int) -> Any:
        found = right(folder, number)
        held.append((number, {tensor.data_ptr() for tensor in found[0].values()}))
        return found

    monkeypatch.setattr(kept, "tensors", look)
    models: list[Decoder] = []
    monkeypatch.setattr("lineshaft.compress.calibrated.load_checkpoint", lambda root: models.append(load_checkpoint(root)) or models[0])
    made.compress("gptq", **INT8)
    mapped = set().union(*(places for _, places in held))
    own = [name for name, tensor in models[0].state_dict().items() if name.startswith("model.layers") and tensor.data_ptr() not in mapped]
    assert own == []


@pytest.mark.parametrize("step", ["gptq", "awq", "smooth"])
def test_what_is_mapped_from_the_checkpoint_is_never_written_to(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were written to stay in memory with the file's last tensor, so they would add up to the whole model."""
    made, models = line(tmp_path / "store", "llama"), []
    mapped: dict[str, Tensor] = {}

    def looked_at(root: Path) -> Decoder:
        models.append(load_checkpoint(root))
        mapped.update({name: parameter.data for name, parameter in models[0].named_parameters()} if len(models) == 1 else {})
        return models[-1]

    monkeypatch.setattr("lineshaft.compress.calibrated.load_checkpoint", looked_at)
    made.compress(step, **SHORT[step])
    stored = load_checkpoint(made.checkpoint.root).state_dict()
    assert mapped.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in mapped.items())
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(models[0].state_dict()[norm], stored[norm]) == (step == "gptq")


@pytest.mark.parametrize("step", ["gptq", "awq"])
def test_statistics_of_a_part_are_gone_before_the_next_is_looked_at(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, known, alive = line(tmp_path / "store", "llama"), weakref.WeakSet[Inputs](), []
    right = Inputs.__init__

    def counted(self: Inputs, inputs: int, wanted: Wanted) -> None:
        right(self, inputs, wanted)
        known.add(self)
        alive.append(len(known))

    monkeypatch.setattr(Inputs, "__init__", counted)
    made.compress(step, **SHORT[step])
    assert len(alive) == 12 and max(alive) == 4  # of a layer: before query, key and value; before o; before gate and up; before down
