"""`lineshaft serve` a second time: from what the first start kept, with the same answers, whatever happens to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tiny_checkpoint import write_checkpoint, write_tokenizer
from world import until

from lineshaft.engine.starts import format as layout
from lineshaft.ops.isa import library
from lineshaft.serve import child

pytestmark = pytest.mark.skipif(sys.platform != "linux" or library() is None, reason="needs Linux and the native kernels")
KEPT = "a start that was kept, asked for and ready in"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    write_tokenizer(made)
    write_checkpoint(made, made)
    return made


@contextmanager
def serving(folder, tmp_path, **environment):
    """Its address, its process, and what it says."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "lineshaft.cli.start", "serve", str(folder), "--port", "0"]
    with log.open("w") as said:
        process = subprocess.Popen(command, stderr=said, env=os.environ | {"LINESHAFT_CACHE": str(tmp_path / "cache")} | environment)
        try:
            until(lambda: "ready in" in log.read_text() or process.poll() is not None, seconds=120)
            yield re.search(r"listening on (\S+)", log.read_text())[1], process, log.read_text
        finally:
            process.terminate()
            process.wait(30)


def answered(url):
    ask = {"model": "model", "prompt": "the price", "max_tokens": 12, "temperature": 0.9, "seed": 3, "logprobs": 2, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(ask).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"]


def programs(tmp_path):
    return [path for path in tmp_path.glob("cache/starts/*/*/program.msgpack") if not path.parent.name.startswith(".")]


def engines(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in children]


def loads_torch(number):
    return "libtorch" in Path(f"/proc/{number}/maps").read_text()


def test_a_second_start_answers_like_the_first_and_loads_no_torch(folder, tmp_path):
    with serving(folder, tmp_path) as (url, process, said):
        wanted = answered(url)
        until(lambda: programs(tmp_path), seconds=60)
        assert KEPT not in said()
        assert loads_torch(*engines(process))
    with serving(folder, tmp_path) as (url, process, said):
        assert KEPT in said()
        assert answered(url) == wanted
        (engine,) = engines(process)
        assert not loads_torch(engine)
        os.kill(engine, signal.SIGKILL)
        until(lambda: said().count(KEPT) == 2, seconds=60)  # so does the engine that is started after a failure
        assert answered(url) == wanted


def test_weights_that_are_not_those_that_were_written_end_the_engine_and_the_next_one_starts_anew(folder, tmp_path):
    with serving(folder, tmp_path) as (url, _, _):
        wanted = answered(url)
        until(lambda: programs(tmp_path), seconds=60)
    (path,) = programs(tmp_path)
    found = layout.read(path)
    layout.write(path, msgspec.structs.replace(found, crc=found.crc ^ 1))  # as if a weight had changed that the first tokens do not show
    with serving(folder, tmp_path) as (url, process, said):
        until(lambda: "loaded in" in said(), seconds=60)
        assert "kept weights are not those that were written" in said()
        assert answered(url) == wanted
        until(lambda: programs(tmp_path), seconds=60)
        assert loads_torch(*engines(process))


def test_a_checkpoint_that_was_changed_is_started_anew(folder, tmp_path):
    with serving(folder, tmp_path) as (url, _, _):
        before = answered(url)
        until(lambda: programs(tmp_path), seconds=60)
    write_checkpoint(folder, folder, seed=1)
    with serving(folder, tmp_path) as (url, _, said):
        assert KEPT not in said()
        assert answered(url) != before


def test_another_number_of_threads_is_another_start_with_that_number(folder, tmp_path):
    for threads in ("2", "1"):
        with serving(folder, tmp_path, OMP_NUM_THREADS=threads) as (_, _, said):
            assert KEPT not in said()
            assert f"; threads: {threads}" in said()
            until(lambda number=threads: [layout.read(path).threads for path in programs(tmp_path)] == [int(number)], seconds=60)
    with serving(folder, tmp_path, OMP_NUM_THREADS="1") as (_, _, said):
        assert KEPT in said()
        assert "; threads: 1" in said()


@pytest.mark.parametrize("hint", [[], ["--set=" + "x" * 300], ["nothing/there"], ["a\0b"]])
def test_whatever_names_the_checkpoint_nobody_waits_for_ever(hint, tmp_path, monkeypatch):
    monkeypatch.setenv("LINESHAFT_CACHE", str(tmp_path))
    (tmp_path / "starts" / "of another checkpoint").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["child", *hint])
    monkeypatch.setattr(child, "_prepared", threading.Event())
    imported = []
    monkeypatch.setattr("importlib.import_module", imported.append)
    child.import_engine()
    assert child._prepared.is_set()
    assert imported in ([], ["lineshaft.serve.loading"])
