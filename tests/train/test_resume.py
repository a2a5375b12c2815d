"""A run that was stopped, however, goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letter_line
import pytest
import torch
from safetensors.torch import load_file
from test_loop import batches_of, config, fresh

from lineshaft.base.errors import StorageFull
from lineshaft.base.store import Artifact, Store
from lineshaft.train import loop, state
from lineshaft.train import optimiser as adamw
from lineshaft.train.objective import NextToken
from lineshaft.train.stage import HISTORY_FILE, PRETRAIN, TrainConfig

Line = tuple[Store, dict[str, Artifact]]
SCRIPT = Path(__file__).with_name("killed_training.py")
CONFIG = letter_line.config()
"""Twelve steps, states after 4 and 8."""


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the run that nobody disturbed."""
    store, parents = letter_line.parents(tmp_path_factory.mktemp("undisturbed"))
    return PRETRAIN(store, CONFIG, **parents).manifest.digest


def stop_at_step(number: int, monkeypatch: pytest.MonkeyPatch, line: Line, config: TrainConfig = CONFIG) -> Path:
    """Run, stopped in the middle of step `number`; the folder of the states."""
    calls = iter(range(1, 1000))
    plain = NextToken.__call__

    def stopping(self: NextToken, *args: Any) -> Any:
        if next(calls) == number:
            raise Stopped
        return plain(self, *args)

    store, parents = line
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(NextToken, "__call__", stopping)
        PRETRAIN(store, config, **parents)
    (scratch,) = (store.root / "work").glob("*/scratch")
    return scratch


def names(scratch: Path) -> list[str]:
    return sorted(path.name for path in scratch.iterdir())


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    digest, steps = told.pop("undisturbed")
    assert steps == 8
    assert {ended for reruns in told.values() for ended, _ in reruns} == {digest}
    fresh_steps = {where: [steps for _, steps in reruns] for where, reruns in told.items()}
    assert all(counts == sorted(counts, reverse=True) for counts in fresh_steps.values()), fresh_steps
    assert (fresh_steps["step"][0], fresh_steps["step"][-1]) == (8, 2)
    assert len(fresh_steps["save"]) > 15
    assert set(fresh_steps["save"]) == {4, 2}  # from the state before, until the rename; from this one, after it
    assert set(fresh_steps["checkpoint"]) == {2}


def test_an_error_just_before_and_just_after_a_state_is_saved(line: Line, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    plain = state.save

    def after(*args: Any) -> None:
        plain(*args)
        raise Stopped

    def before(*args: Any) -> None:
        raise Stopped

    for replacement in (before, after, before):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(state, "save", replacement)
            PRETRAIN(store, CONFIG, **parents)
    assert PRETRAIN(store, CONFIG, **parents).manifest.digest == digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", flip),
        ("state.json", flip),
        ("files.json", flip),
        ("files.json", Path.unlink),
        ("state.safetensors", Path.unlink),
        ("files.json", lambda path: path.write_text("[]")),
        ("files.json", lambda path: path.write_text("7")),
        ("state.json", lambda path: path.write_text("")),
    ],
)
def test_a_damaged_newest_state_costs_time_and_changes_nothing(
    line: Line, digest: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None]
) -> None:
    store, parents = line
    scratch = stop_at_step(10, monkeypatch, line)
    assert names(scratch) == ["step-00000004", "step-00000008"]
    damage(scratch / "step-00000008" / file)
    stop_at_step(7, monkeypatch, line)  # the eleventh: it went back to 4, and has saved 8 a second time
    assert names(scratch) == ["step-00000004", "step-00000008"]
    told = capfd.readouterr().err
    assert told.count("resume: step-00000008 is damaged, going back to the one before: ") == 1
    assert PRETRAIN(store, CONFIG, **parents).manifest.digest == digest
    assert "damaged" not in capfd.readouterr().err


def test_when_every_state_is_damaged_the_run_begins_anew(line: Line, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    scratch = stop_at_step(10, monkeypatch, line)
    for folder in scratch.iterdir():
        flip(folder / "state.safetensors")
    stop_at_step(6, monkeypatch, line)
    assert names(scratch) == ["step-00000004"]
    assert PRETRAIN(store, CONFIG, **parents).manifest.digest == digest


def test_experts_that_get_no_token_in_some_steps_resume_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW counts the updates of each parameter: an expert without tokens has no gradient, and falls behind."""
    small = letter_line.config(sequence_tokens=3, rows=1)
    store, parents = letter_line.parents(tmp_path / "undisturbed")
    undisturbed = PRETRAIN(store, small, **parents)
    line = letter_line.parents(tmp_path / "stopped")
    scratch = stop_at_step(6, monkeypatch, line, small)
    saved = load_file(scratch / "step-00000004" / "state.safetensors")
    counts = {name: int(tensor) for name, tensor in saved.items() if name.startswith("step.")}
    assert min(counts.values()) < max(counts.values()) == 4
    resumed = PRETRAIN(line[0], small, **line[1])
    assert resumed.manifest.digest == undisturbed.manifest.digest


def test_only_the_newest_states_are_kept_and_none_when_the_run_is_done(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = stop_at_step(12, monkeypatch, line, letter_line.config(save_every=2))
    assert names(scratch) == ["step-00000008", "step-00000010"]
    store, parents = line
    PRETRAIN(store, letter_line.config(save_every=2), **parents)
    assert not list((store.root / "work").iterdir())


def test_a_resumed_run_counts_its_own_tokens_and_all_tokens(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line
    stop_at_step(10, monkeypatch, line)
    seen: list[loop.Trained] = []
    plain = loop.run
    monkeypatch.setattr(loop, "run", lambda *args: seen.append(plain(*args)) or seen[-1])
    made = PRETRAIN(store, CONFIG, **parents)
    assert (seen[0].tokens, seen[0].fresh_tokens) == (12 * 32, 4 * 32)
    assert made.manifest.facts["tokens"] == 12 * 32
    history = [json.loads(line) for line in made.path(HISTORY_FILE).read_text().splitlines()]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10, 12]


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(line: Line, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parents = line

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop_at_step(6, monkeypatch, line)
    with monkeypatch.context() as patch, pytest.raises(StorageFull, match="the disk is full"):
        patch.setattr(state, "save_file", full)
        PRETRAIN(store, CONFIG, **parents)
    assert not list((store.root / "artifacts").glob("checkpoint-*"))
    (scratch,) = (store.root / "work").glob("*/scratch")
    assert "step-00000004" in names(scratch)
    assert PRETRAIN(store, CONFIG, **parents).manifest.digest == digest


def test_the_state_restores_every_number(tmp_path: Path, line: Line) -> None:
    model = fresh()
    stopped = config(steps=5, save_every=2, balance_speed=0.1)
    loop.run(model, batches_of(line), NextToken(), stopped, tmp_path / "a")
    again = fresh(seed=8)
    optimiser = adamw.build(again, stopped.optimiser)
    done, history = state.restore(tmp_path / "a", again, optimiser)
    assert (done, [entry["step"] for entry in history]) == (4, [1, 2, 3, 4])
    state.save(tmp_path / "b", 4, again, optimiser, history)
    one, other = ((tmp_path / part / "step-00000004" / "state.safetensors").read_bytes() for part in "ab")
    assert one == other
    assert torch.equal(again.routers()[0].load, torch.zeros(4))
