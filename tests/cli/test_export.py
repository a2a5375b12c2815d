"""`lineshaft export`, from a folder and from a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_line import Line, environment
from typer.testing import CliRunner

from lineshaft.base.errors import LineshaftError
from lineshaft.base.store import Store
from lineshaft.cli.main import app

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'lineshaft[export]'")


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["export", *map(str, args)], prog_name="lineshaft", env=environment())
    if isinstance(done.exception, LineshaftError):
        return done.exception.exit_code, str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_a_checkpoint_of_the_store_is_written_for_token_ids(line: Line, tmp_path: Path) -> None:
    code, told = run(line.id("train"), tmp_path / "m.gguf", "--to", "gguf", "--tokenizer", "none", "--store", line.store, "--json")
    assert code == 0
    said = json.loads(told)
    assert said["path"] == str(tmp_path / "m.gguf")
    assert said["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert said["tensors"] == len(gguf.GGUFReader(tmp_path / "m.gguf").tensors) == sum(said["kinds"].values())
    assert said["seen"] == {"offset_error_steps": 0.0}


def test_our_own_tokenizer_is_refused_with_what_to_do(line: Line, tmp_path: Path) -> None:
    code, told = run(line.id("train"), tmp_path / "m.gguf", "--to", "gguf", "--store", line.store)
    assert code == 5
    assert "--tokenizer none" in told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_will_do(line: Line, tmp_path: Path) -> None:
    folder = Store(line.store).open(line.id("train")).root
    code, told = run(folder, tmp_path / "m.gguf", "--to", "gguf", "--tokenizer", "none")
    assert (code, told) == (0, "")  # what people read goes to stderr
    assert (tmp_path / "m.gguf").is_file()


def test_layers_without_whole_blocks_are_named(line: Line, tmp_path: Path) -> None:
    code, told = run("tiny", tmp_path / "m.gguf", "--to", "gguf", "--tokenizer", "none", "--store", line.store)
    assert code == 2
    assert "mlp.down_proj: 48 inputs" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["nowhere", "m.gguf", "--to", "gguf"], 4, "nowhere"),
        (["nowhere", "m.gguf", "--to", "safetensors"], 2, ""),
        (["nowhere", "m.gguf"], 2, ""),
    ],
)
def test_wrong_input_is_one_message(args: list[str], code: int, part: str, line: Line) -> None:
    found, told = run(*args, "--store", line.store)
    assert found == code
    assert part in told
