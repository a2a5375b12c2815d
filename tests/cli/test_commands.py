"""The command line with right and wrong input, as processes where the process matters, in this one where it does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import jsonschema
import pytest
import yaml
from calling import call
from tiny_line import STEPS, Line, begun, command, environment, write_recipe
from typer.testing import CliRunner

from lineshaft.base.store import Store
from lineshaft.cli.main import app
from lineshaft.pipeline.recipe import Recipe
from lineshaft.records.report import read_report

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
COMMANDS = ("run", "serve", "bench", "compare", "show", "verify", "check", "schema")
COMMANDS += ("data", "tokenizer", "tokens", "train", "finetune", "compress", "evaluate", "adopt")


@pytest.fixture
def store(line: Line, tmp_path: Path) -> Path:
    return line.copy(tmp_path / "store")


# -- messages ---------------------------------------------------------------------------------------------------


def test_a_refusal_is_one_message_on_stderr_with_its_exit_code_and_no_traceback(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "mine.yaml", {"train": {"sed": 3}})
    told = begun("run", path, "--store", tmp_path / "store").ended()
    assert told == (2, "", 'lineshaft: "train.sed": unknown; did you mean "seed"?\n')
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["run", "none.yaml"], 2, r"none\.yaml: no such recipe file"),
        (["run", str(QUICKSTART), "--set", "train.seed"], 2, "write it as a.b=value"),
        (["run", str(QUICKSTART), "--set", "train.seeed=2"], 2, 'did you mean "seed"'),
        (["run", str(QUICKSTART), "--set", "name=a/b"], 2, '"name"'),
        (["show"], 4, "there is no store here; run a recipe first"),
        (["verify", "prod"], 4, "there is no store here"),
        (["serve", "nowhere"], 4, '"nowhere": no folder with a config.json, and there is no store'),
        (["serve", "."], 4, "no config.json here"),
        (["serve", ".", "--set", "sever.port=1"], 2, "begin with server. or engine."),
        (["serve", ".", "--dtype", "float8"], 2, '"engine.dtype"'),
        (["serve", ".", "--port", "70000"], 2, '"server.port"'),
        (["adopt", "nowhere"], 5, "no config.json here"),
        (["data", "--source", "nowhere"], 3, "nowhere: no such file or folder"),
        (["data", "--heldout-share", "2"], 2, '"heldout_share"'),
        (["data", "--heldout-share", "a lot"], 2, '"heldout_share".*number'),
        (["compare", "one", "other"], 4, '"one": no folder of a report, and there is no store'),
        (["tokenizer", "nothing"], 4, '"nothing": no artifact or reference of that name'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    got, output = call(*args)
    assert (got, bool(re.search(told, output))) == (code, True), output


def test_an_artifact_of_the_wrong_kind_is_refused_with_both_kinds_named(line: Line, store: Path) -> None:
    assert call("tokenizer", line.id("train"), "--store", store) == (
        2,
        f"train_tokenizer: corpus must be a corpus, {line.id('train')} is a checkpoint",
    )
    code, told = call("serve", line.id("data"), "--store", store)
    assert (code, told) == (2, f"{line.id('data')} is a corpus: only a checkpoint can be served")


def test_unknown_options_and_commands_are_refused() -> None:
    assert call("run", QUICKSTART, "--sett", "a=b")[0] == 2
    assert call("rum")[0] == 2
    assert call("run")[0] == 2


# -- help, version, schema, explain -----------------------------------------------------------------------------


def test_the_version_is_the_packages() -> None:
    assert call("--version") == (0, f"lineshaft {importlib.metadata.version('lineshaft')}\n")


def test_help_lists_every_command_and_each_explains_itself() -> None:
    code, text = call("--help")
    assert code == 0
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", text)] == []
    for name in COMMANDS:
        code, text = call(name, "--help")
        assert code == 0
        assert "Traceback" not in text


def test_a_stages_options_carry_the_docstrings_of_its_config() -> None:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", call("train", "--help")[1]).split())
    assert "--seed INTEGER Decides fresh weights and the order of the text. Default: 1." in text


def test_serve_keeps_the_options_that_are_promised() -> None:
    text = call("serve", "--help")[1]
    assert [option for option in ("--host", "--port", "--dtype") if option not in text] == []


def test_the_schema_is_one_that_a_validator_accepts_the_quickstart_with() -> None:
    schema = json.loads(call("schema")[1])
    assert schema == Recipe.model_json_schema()
    check = jsonschema.Draft202012Validator(schema)
    table = yaml.safe_load(QUICKSTART.read_text())
    table["train"]["loop"]["optimiser"]["peak_lr"] = 4e-3  # YAML 1.1 of this reader takes 4e-3 for a text; ours does not
    assert check.is_valid(table), list(check.iter_errors(table))
    assert not check.is_valid(table | {"trian": {}})
    assert not check.is_valid(table | {"name": "a/b"})


def test_explain_says_where_each_value_came_from_and_runs_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "mine.yaml", {"train": {"seed": 7}})
    code, text = call("run", path, "--explain", "--set", "train.rows=2", "--store", tmp_path / "store")
    assert code == 0
    lines = text.splitlines()
    assert "train.seed = 7    # mine.yaml" in lines
    assert "train.rows = 2    # --set" in lines
    assert 'data.source = "stdlib"    # default' in lines
    table = json.loads(call("run", path, "--explain", "--json")[1])
    assert table["train.seed"] == {"value": 7, "from": "mine.yaml"}
    assert not (tmp_path / "store").exists()


# -- show and verify --------------------------------------------------------------------------------------------


def test_show_lists_everything_with_its_references(line: Line, store: Path) -> None:
    code, text = call("show", "--store", store)
    assert code == 0
    rows = {row.split()[0]: row.split()[1:] for row in text.splitlines()}
    assert rows.keys() == {line.id(step) for step in STEPS}
    assert rows[line.id("compress")] == ["compress", "tiny"]
    table = json.loads(call("show", "--store", store, "--json")[1])
    assert [item["refs"] for item in table["artifacts"] if item["refs"]] == [["tiny"]]


def test_show_tells_an_artifacts_parents_children_config_and_files(line: Line, store: Path) -> None:
    code, text = call("show", line.id("train"), "--store", store)
    assert code == 0
    for told in (
        f"parent    tokens: {line.id('tokens')}",
        f"child     {line.id('compress')}  (made by compress)",
        "config    loop.steps = 12",
        "file      model.safetensors",
    ):
        assert told in text
    table = json.loads(call("show", "tiny", "--store", store, "--json")[1])
    assert table["manifest"]["id"] == line.id("compress")
    assert table["refs"] == ["tiny"]
    assert {child["id"] for child in table["children"]} == {line.id("evaluate_compressed"), line.id("serve")}


def test_show_names_what_is_there_when_a_name_is_unknown(store: Path) -> None:
    code, told = call("show", "prod", "--store", store)
    assert code == 4
    assert '"prod": no artifact or reference of that name' in told
    assert "references here: tiny" in told


def test_verify_reads_everything_and_finds_every_flipped_bit(line: Line, store: Path) -> None:
    code, text = call("verify", "--store", store)
    assert (code, len(text.splitlines())) == (0, len(STEPS))
    hurt = []
    for step in STEPS:
        root = store / "artifacts" / line.id(step)
        for path in sorted(root.iterdir())[:: len(list(root.iterdir())) - 1]:  # the first and the last
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            code, told = call("verify", line.id(step), "--store", store)
            assert (code, f"{path}: block 0" in told) == (4, True), told
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        content[0] ^= 1
        path.write_bytes(content)
        hurt.append(path)
    code, told = call("verify", "--store", store)
    assert code == 4
    assert [str(path) for path in hurt if f"{path}: block 0" not in told] == []


# -- stages one by one ------------------------------------------------------------------------------------------


def options(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{key}.")
        else:
            yield from ("--set", f"{prefix}{key}={json.dumps(value)}")


def test_the_stages_one_by_one_ask_for_the_very_artifacts_of_the_recipe(line: Line, store: Path) -> None:
    """They are found made: had any config differed, the ids would, and a stage would run."""
    recipe = yaml.safe_load(line.recipe.read_text())

    def made(stage: str, *args: str) -> str:
        code, text = call(stage, *args, "--store", store)
        assert code == 0, text
        return text.strip()

    corpus = made("data", "--source", str(line.texts), "--heldout-share", "0.2")
    tokenizer = made("tokenizer", corpus, "--vocab-size", "300")
    tokens = made("tokens", tokenizer)
    train = recipe["train"]
    checkpoint = made("train", tokens, "--rows", str(train.pop("rows")), *options(train))
    compressed = made("compress", checkpoint)
    reports = [made("evaluate", name, *options(recipe["evaluate"])) for name in (checkpoint, compressed)]
    assert [corpus, tokenizer, tokens, checkpoint, compressed, *reports] == [line.id(step) for step in STEPS[:-1]]
    assert call("compress", checkpoint, "--group", "null", "--store", store)[1].strip() == compressed


def test_a_stage_tells_machines_what_it_made(line: Line, store: Path) -> None:
    table = json.loads(call("compress", line.id("train"), "--store", store, "--json")[1])
    assert table["id"] == line.id("compress")
    assert Path(table["path"]).is_dir()
    assert table["facts"]["format"].startswith("int8")


def test_a_reference_stands_for_its_artifact_and_parents_may_be_named(line: Line, store: Path) -> None:
    Store(store).set_ref("base", line.id("train"))
    assert call("compress", "base", "--store", store)[1].strip() == line.id("compress")
    train = [*options(yaml.safe_load(line.recipe.read_text())["train"]), "--store", store]
    assert call("train", line.id("tokens"), "--tokenizer", line.id("tokenizer"), *train)[1].strip() == line.id("train")
    code, told = call("train", line.id("tokens"), "--tokenizer", line.id("data"), *train)
    assert (code, "tokenizer must be a tokenizer" in told) == (2, True)


def test_what_no_ancestor_gives_must_be_named(line: Line, store: Path, hugging_face: Path) -> None:
    code, told = call("evaluate", hugging_face, "--store", store)
    assert (code, "name one with --tokens" in told) == (4, True), told


@pytest.fixture(scope="module")
def hugging_face(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: a Llama with our tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "small-llama"
    shape = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(line.store / "artifacts" / line.id("tokenizer")).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_can_be_adopted_and_compressed(store: Path, hugging_face: Path) -> None:
    code, adopted = call("adopt", hugging_face, "--store", store)
    assert (code, adopted[:11]) == (0, "checkpoint-"), adopted
    code, compressed = call("compress", hugging_face, "--store", store)
    assert code == 0, compressed
    assert Store(store).open(compressed.strip()).manifest.parents == {"checkpoint": adopted.strip()}
    moved = shutil.copytree(hugging_face, store / "elsewhere")
    assert call("adopt", moved, "--store", store)[1] == adopted


def test_a_hugging_face_folder_is_evaluated_on_text_cut_by_its_own_tokenizer(line: Line, store: Path, hugging_face: Path) -> None:
    speed = ["--set", "speed={prompt_tokens: 8, output_tokens: 4, requests: 2, batch: 2}", "--sequence-tokens", "32", "--store", store]
    code, told = call("evaluate", hugging_face, "--tokens", line.id("tokens"), *speed)
    assert (code, "another tokenizer" in told) == (2, True)  # transformers writes the file anew
    code, tokens = call("tokens", hugging_face, "--corpus", line.id("data"), "--store", store)
    assert code == 0, tokens
    code, report = call("evaluate", hugging_face, "--tokens", tokens.strip(), *speed)
    assert code == 0, report
    assert read_report(Store(store).open(report.strip()))[0].metrics["loss_nats_per_token"] > 1


def test_a_checkpoint_of_the_store_can_be_adopted_by_its_path(line: Line, tmp_path: Path) -> None:
    code, adopted = call("adopt", line.store / "artifacts" / line.id("compress"), "--store", tmp_path / "store")
    assert code == 0, adopted


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_something_is_not_adopted(hugging_face: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(hugging_face, tmp_path / "folder")
    (folder / missing).unlink()
    code, told = call("adopt", folder, "--store", tmp_path / "store")
    assert (code, missing in told) == (5, True), told
    assert not list(Store(tmp_path / "store").all())


# -- serving ----------------------------------------------------------------------------------------------------


def test_the_recipes_name_can_be_served_and_answers(line: Line) -> None:
    args = ["serve", "tiny", "--store", str(line.store), "--host", "127.0.0.1", "--port", "0", "--dtype", "float32"]
    with forked.heard(args, environment()) as (server, stderr):
        try:
            url = next(said.split()[-1] for said in stderr if said.startswith("listening on"))
            assert any(said.startswith("ready in") for said in stderr)
            body = json.dumps({"model": "tiny", "prompt": "The model", "max_tokens": 8, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                told = json.load(answer)
            assert told["model"] == "tiny"
            kept = line.store / "artifacts" / line.id("serve") / "exchanges.jsonl"
            assert told["choices"][0]["text"] == json.loads(kept.read_text())["answer"]
        finally:
            os.kill(server.pid, signal.SIGINT)
        server.join(60)
        assert server.exitcode == 0
        assert "Traceback" not in stderr.read()


def test_a_port_in_use_is_told_in_words(line: Line) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, told = call("serve", "tiny", "--store", line.store, "--port", str(port))
    assert (code, f"can't listen on 127.0.0.1 port {port}" in told) == (2, True), told


def test_a_damaged_checkpoint_is_not_served(line: Line, store: Path) -> None:
    path = store / "artifacts" / line.id("compress") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    code, told = call("serve", "tiny", "--store", store, "--port", "0")
    assert (code, f"{path}: block 0" in told) == (4, True), told


# -- the process ------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_run_without_a_traceback_and_keeps_what_can_be_resumed(line: Line, tmp_path: Path) -> None:
    store = Store(line.copy(tmp_path / "store"))
    long = ("--set", "train.loop.steps=100000", "--set", "train.loop.save_every=2")
    call_it = command("run", line.recipe, "--store", store.root, *long)
    with subprocess.Popen(call_it, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True) as run:
        assert run.stderr
        begun = next(said for said in run.stderr if "train: checkpoint-" in said)
        work = store.root / "work" / begun.split()[2]
        while not list(work.glob("scratch/step-*")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
        assert run.wait(60) == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "lineshaft: stopped; what was finished is kept, and the same command goes on from there"
    assert list(work.glob("scratch/step-*"))
    assert not (work / "payload").exists()


@pytest.mark.parametrize("args", [["show"], ["schema"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error_to_talk_about(line: Line, args: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with tempfile.TemporaryFile("w+") as err:
        with os.fdopen(writing, "w") as out:
            child = forked.start(args if args == ["schema"] else [*args, "--store", str(line.store)], environment(), out, err)
        child.join(60)
        err.seek(0)
        assert (child.exitcode, err.read()) == (1, "")


def test_a_reference_to_what_was_deleted_says_so(line: Line, store: Path) -> None:
    shutil.rmtree(store / "artifacts" / line.id("compress"))
    for given in (["serve", "tiny"], ["show", "tiny"], ["compress", "tiny"]):
        code, told = call(*given, "--store", store)
        assert (code, f"{line.id('compress')}" in told and "no longer in" in told) == (4, True), told


def test_a_store_that_cannot_be_made_is_told_in_words(line: Line, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, told = call("run", line.recipe, "--store", tmp_path / "file")
    assert (code, "can't hold a store" in told) == (4, True), told


def test_a_store_named_by_the_environment_is_used(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINESHAFT_STORE", str(line.store))
    done = CliRunner().invoke(app, ["show"])
    assert line.id("train") in done.output
