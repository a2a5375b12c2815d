"""Carrying out a recipe: what is made, what is found made, what is refused.

The exact sets of stages are asked of the real graph, configs, inputs and keys with stage bodies that only write down that
they were called; the rest runs the real line in processes of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_line import LLAMA, STEPS, Line, begun, command, digests, environment, recipe, write_recipe, write_texts

from lineshaft.base.config import load, merge, nest
from lineshaft.base.errors import Corrupt, StorageFull
from lineshaft.base.store import Draft, Store
from lineshaft.pipeline import graph
from lineshaft.pipeline.outcome import Outcome
from lineshaft.pipeline.recipe import Recipe
from lineshaft.pipeline.run import run, write_report
from lineshaft.records.exchange import Exchange, Timing, write_exchanges
from lineshaft.records.report import Measured, Report
from lineshaft.records.report import write_report as write_report_record

TOKENIZER = b"{}"


class Bench:
    """The real graph over stages that build next to nothing."""

    def __init__(self, folder: Path) -> None:
        self.store, self.texts = Store(folder / "store"), write_texts(folder / "texts")
        self.table, self.built = recipe(self.texts), []

    def fake(self, step: graph.Step) -> graph.Step:
        def build(draft: Draft, config: Any) -> None:
            self.built.append(step.name)
            if step.stage.kind in ("tokenizer", "checkpoint"):
                (draft.root / "tokenizer.json").write_bytes(TOKENIZER)
            if step.stage.kind == "tokens":
                draft.facts["tokenizer_sha256"] = hashlib.sha256(TOKENIZER).hexdigest()
            if step.stage.kind == "report":
                write_report_record(draft, Report(subject="nothing", format="dense", metrics={}), Measured(metrics={}))
            if step.stage.kind == "traffic":
                said = Exchange(model="m", prompt="p", answer="a", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
                write_exchanges(draft, [(said, Timing(ready_seconds=0, first_token_seconds=0, seconds=0))])
            (draft.root / "payload.bin").write_text(step.name)

        settle = {"settle": lambda config, _: config} if step.section == "compress" else {}  # it would look into the checkpoint
        return dataclasses.replace(step, stage=dataclasses.replace(step.stage, build=build, **settle))

    def run(self, **changed: Any) -> tuple[list[str], Outcome]:
        """Run the recipe with dotted values changed (two underscores for the dot); the steps that were built."""
        table, self.built = self.table, []
        for dotted, value in changed.items():
            table = merge(table, nest(dotted.replace("__", "."), value))
        outcome = run(self.store, load(Recipe, table))
        assert [node.name for node in outcome.nodes if not node.cached] == self.built
        return self.built, outcome


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    steps = graph._steps
    monkeypatch.setattr(graph, "_steps", lambda recipe: ((bench.fake(step), config) for step, config in steps(recipe)))
    return bench


def test_the_second_run_calls_no_stage_and_ends_with_the_same_artifacts(bench: Bench) -> None:
    first, made = bench.run()
    second, found = bench.run()
    assert first == list(STEPS)
    assert second == []
    assert [node.artifact.id for node in found.nodes] == [node.artifact.id for node in made.nodes]
    assert len({node.artifact.id for node in made.nodes}) == len(STEPS)


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        ({"train__seed": 2}, ["train", "compress", "evaluate_base", "evaluate_compressed", "serve"]),
        ({"train__loop__optimiser__peak_lr": 1e-3}, ["train", "compress", "evaluate_base", "evaluate_compressed", "serve"]),
        ({"compress__group": 16}, ["compress", "evaluate_compressed", "serve"]),
        ({"evaluate__usd_per_hour": 3}, ["evaluate_base", "evaluate_compressed"]),
        ({"serve__prompt": "Another"}, ["serve"]),
        ({"serve__ready_limit_seconds": 9}, []),
        ({"tokens__shard_tokens": 9}, list(STEPS[2:])),
        ({"tokenizer__vocab_size": 280}, list(STEPS[1:])),
        ({"data__heldout_share": 0.25}, list(STEPS)),
        ({"data__rules": {"min_words": 5}}, list(STEPS)),
        ({"name": "other"}, []),
        ({"compress": None}, ["serve"]),
        ({"serve": None, "evaluate": None}, []),
    ],
    ids=str,
)
def test_a_changed_value_reruns_its_stage_and_those_below_and_no_other(bench: Bench, changed: dict[str, Any], rerun: list[str]) -> None:
    bench.run()
    assert bench.run(**changed)[0] == rerun
    assert bench.run()[0] == []  # and the old results are still there


def test_a_changed_source_reruns_everything_and_a_moved_one_nothing(bench: Bench) -> None:
    bench.run()
    moved = bench.texts.rename(bench.texts.with_name("elsewhere"))
    assert bench.run(data__source=str(moved))[0] == []
    (moved / "note-00.txt").write_text("Another text altogether, of more than ten words, so that it is kept and changes all.")
    assert bench.run(data__source=str(moved))[0] == list(STEPS)


def test_compress_may_be_a_list_of_steps_and_the_last_one_is_what_is_served(bench: Bench) -> None:
    last = {"step": "gptq", "bits": 4, "group": 16}
    steps = [{"step": "smooth"}, {"step": "prune", "channels": 0.5}, {"step": "smooth", "alpha": 0.7}, last]
    built, outcome = bench.run(compress=steps)
    assert built[3:8] == ["train", "smooth", "prune", "smooth_2", "compress"]
    ids = {node.name: node.artifact for node in outcome.nodes}
    chain = ["train", "smooth", "prune", "smooth_2", "compress"]
    assert all(ids[after].manifest.parents["checkpoint"] == ids[before].id for before, after in itertools.pairwise(chain))
    assert ids["compress"].manifest.parents["tokens"] == ids["tokens"].id
    assert ids["evaluate_compressed"].manifest.parents["checkpoint"] == ids["compress"].id
    assert bench.run(compress=[*steps[:3], steps[3] | {"damp": 0.1}])[0] == ["compress", "evaluate_compressed", "serve"]


def test_a_stage_that_is_left_out_takes_with_it_what_hangs_on_it(bench: Bench) -> None:
    built, outcome = bench.run(compress=None, evaluate=None)
    assert built == ["data", "tokenizer", "tokens", "train", "serve"]
    assert bench.store.refs() == {"tiny": outcome.nodes[3].artifact.id}


def test_the_recipes_name_points_to_the_checkpoint_at_the_end_of_the_line(bench: Bench) -> None:
    outcome = bench.run()[1]
    assert bench.store.refs() == {"tiny": next(node.artifact.id for node in outcome.nodes if node.name == "compress")}


def test_a_failing_stage_leaves_the_reference_where_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.run()[1].nodes[4].artifact.id

    def fail(draft: Draft, config: Any) -> None:
        raise Corrupt("broken on purpose")

    def failing(step: graph.Step) -> graph.Step:
        return dataclasses.replace(step, stage=dataclasses.replace(step.stage, build=fail)) if step.name == "serve" else step

    steps = graph._steps
    monkeypatch.setattr(graph, "_steps", lambda recipe: ((failing(step), config) for step, config in steps(recipe)))
    with pytest.raises(Corrupt, match="on purpose"):
        bench.run(train__seed=5)
    assert bench.store.refs() == {"tiny": before}


def flip(path: Path, place: int = -1) -> None:
    """Turn one bit over in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 4
    path.write_bytes(content)


SHOWN = {
    "evaluate_base": ["report.json", "greedy.u32", "generations.jsonl", "measured.json"],
    "serve": ["exchanges.jsonl", "timings.jsonl"],
    "train": ["history.jsonl"],
}


@pytest.mark.parametrize(("step", "name"), [(step, name) for step, names in SHOWN.items() for name in names])
def test_a_cached_run_shows_nothing_that_is_damaged(line: Line, tmp_path: Path, step: str, name: str) -> None:
    store = Store(line.copy(tmp_path / "store"))
    flip(store.root / "artifacts" / line.id(step) / name)
    with pytest.raises(Corrupt, match=f"{name}: block 0"):
        run(store, load(Recipe, recipe(line.texts)))


FIRST_FILES = {
    "data": "documents-00000.parquet",
    "tokenizer": "tokenizer.json",
    "tokens": "train-00000.bin",
    "train": "model.safetensors",
    "compress": "model.safetensors",
}
CONSUMERS = {
    "data": {"tokenizer.min_frequency": 3},
    "tokenizer": {"tokens.shard_tokens": 500},
    "tokens": {"train.seed": 2},
    "train": {"compress.group": 16},
    "compress": {"serve.prompt": "One"},
}


@pytest.mark.parametrize("step", FIRST_FILES)
def test_a_flipped_bit_is_refused_by_the_stage_that_works_from_it(line: Line, tmp_path: Path, step: str) -> None:
    store = Store(line.copy(tmp_path / "store"))
    flip(store.root / "artifacts" / line.id(step) / FIRST_FILES[step])
    table = recipe(line.texts)
    for dotted, value in CONSUMERS[step].items():
        table = merge(table, nest(dotted, value))
    with pytest.raises(Corrupt, match=f"{line.id(step)}/{FIRST_FILES[step]}: block 0"):
        run(store, load(Recipe, table))
    made = {path.name for path in (store.root / "artifacts").iterdir()}
    assert made == {path.name for path in (line.store / "artifacts").iterdir()}


def test_a_checkpoint_with_another_tokenizer_than_it_was_made_with_is_called_damaged(line: Line, tmp_path: Path) -> None:
    """Not "made with another tokenizer", which is what the evaluation would make of it."""
    store = Store(line.copy(tmp_path / "store"))
    flip(store.root / "artifacts" / line.id("train") / "tokenizer.json")
    with pytest.raises(Corrupt, match=r"tokenizer\.json: block 0"):
        run(store, load(Recipe, merge(recipe(line.texts), {"evaluate": {"usd_per_hour": 9}})))


def test_the_line_makes_every_artifact_with_its_kind(line: Line) -> None:
    kinds = {"data": "corpus", "tokenizer": "tokenizer", "tokens": "tokens", "train": "checkpoint", "compress": "checkpoint"}
    kinds |= {"evaluate_base": "report", "evaluate_compressed": "report", "serve": "traffic"}
    assert {step: line.id(step).split("-")[0] for step in STEPS} == kinds
    store = Store(line.store)
    assert {store.open(item.id).id for item in store.all()} == {line.id(step) for step in STEPS}  # every byte is checked
    assert not list((store.root / "work").iterdir())
    assert store.resolve("tiny") == line.id("compress")


def test_every_stage_is_announced_with_its_number(line: Line) -> None:
    announced = [said for said in line.said.splitlines() if said.startswith("[")]
    assert announced == [f"[{number}/8] {step}: {line.id(step)}" for number, step in enumerate(STEPS, 1)]


def test_a_cached_run_by_the_command_line_is_quick_and_says_so(line: Line, tmp_path: Path) -> None:
    store = line.copy(tmp_path / "store")
    status, told, said = begun("run", line.recipe, "--store", store).ended()
    assert status == 0, said
    assert said.count("(made before)") == len(STEPS)
    assert [row.split()[2] for row in told.splitlines()[1 : 1 + len(STEPS)]] == ["cached"] * len(STEPS)
    assert (store / "pages" / "tiny.html").is_file()


def test_a_llama_goes_through_the_same_line_and_lands_in_its_own_artifacts(line: Line, tmp_path: Path) -> None:
    table = recipe(line.texts, LLAMA) | {"evaluate": None, "name": "llama"}
    outcome = run(Store(line.copy(tmp_path / "store")), load(Recipe, table))
    assert [node.name for node in outcome.nodes if not node.cached] == ["train", "compress", "serve"]
    assert json.loads(outcome.nodes[3].artifact.path("config.json").read_text())["model_type"] == "llama"
    assert len(outcome.exchanges()) == 1


def test_two_runs_at_once_share_the_work_and_both_succeed(line: Line, tmp_path: Path) -> None:
    table = recipe(line.texts) | {"evaluate": None, "serve": None}
    path, store = write_recipe(tmp_path / "tiny.yaml", table), tmp_path / "store"
    both = [begun("run", path, "--store", store, "--json") for _ in range(2)]
    told = [command.ended() for command in both]
    assert [status for status, _, _ in told] == [0, 0], told
    one, other = (digests(json.loads(out)) for _, out, _ in told)
    wanted = {step: digest for step, digest in line.digests().items() if step in STEPS[:5]}
    assert one == other == wanted
    stages = [json.loads(out)["stages"] for _, out, _ in told]
    assert {item.id for item in Store(store).all()} == {stage["id"] for stage in stages[0]}


def network_free() -> list[str]:
    """A command in front that takes the network away but for loopback."""
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("taking the network away takes root, unshare and ip")
    ahead = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    tried = subprocess.run([*ahead, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the network can't be taken away here: {tried.stderr.strip()}")
    return ahead


def test_without_network_and_with_an_empty_home_the_digests_are_the_same(line: Line, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run_it = [*network_free(), *command("run", line.recipe, "--store", tmp_path / "store", "--json")]
    done = subprocess.run(run_it, capture_output=True, text=True, env=environment() | {"HOME": str(home)}, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(json.loads(done.stdout)) == line.digests()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a given size, mounted for the test."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk can't be mounted here, which takes root: {done.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", "-l", disk], check=False, capture_output=True)


def test_a_full_disk_is_told_in_words_and_a_rerun_goes_on_once_there_is_room(
    line: Line, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("4m")
    path = write_recipe(tmp_path / "tiny.yaml", recipe(line.texts) | {"evaluate": None, "serve": None})
    filler = disk / "filler"
    filler.write_bytes(bytes(3700 << 10))
    status, _, said = begun("run", path, "--store", disk / "store", "--json").ended()
    assert status == 4, said
    assert "the disk is full" in said and "Free space" in said and "Traceback" not in said
    filler.unlink()
    status, told, said = begun("run", path, "--store", disk / "store", "--json").ended()
    assert status == 0, said
    assert digests(json.loads(told)).items() <= line.digests().items()


def test_a_disk_too_full_for_the_page_is_told_in_words(bench: Bench, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("256k")
    bench.store = Store(disk / "store")
    outcome = bench.run()[1]
    with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(StorageFull, match="the disk is full"):
        write_report(bench.store, load(Recipe, bench.table), outcome)
