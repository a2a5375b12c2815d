"""`lineshaft serve` a second time: from what the first start kept, with the same answers, whatever happens to it."""

import json
import os
import re
import shutil
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


class Home:
    """A checkpoint, and where its starts are kept. Each test leaves a kept start behind for the next one, or forgets all."""

    def __init__(self, root):
        self.root, self.folder, self.answers = root, root / "model", None
        self.folder.mkdir()
        write_tokenizer(self.folder)
        write_checkpoint(self.folder, self.folder)

    def started(self):
        with serving(self.folder, self.root) as (url, process, said):
            self.answers = answered(url)
            until(lambda: programs(self.root), seconds=60)
            assert KEPT not in said()
            assert loads_torch(*engines(process))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def kept(home):
    """A start of this checkpoint is kept, with one thread. Its folder, where that is, and what it answers."""
    if home.answers is None:
        shutil.rmtree(home.root / "cache", ignore_errors=True)
        home.started()
    wanted, home.answers = home.answers, None
    return home.folder, home.root, wanted


@contextmanager
def serving(folder, tmp_path, **environment):
    """Its address, its process, and what it says."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "lineshaft.cli.start", "serve", str(folder), "--port", "0"]
    settings = {"LINESHAFT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | environment
    with log.open("w") as said:
        process = subprocess.Popen(command, stderr=said, env=os.environ | settings)
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


def kept_threads(tmp_path):
    """Of the starts that are kept. The engine replaces one by removing it: what has gone since it was found is not there yet."""
    try:
        return [layout.read(path).threads for path in programs(tmp_path)]
    except FileNotFoundError:
        return []


def engines(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in children]


def loads_torch(number):
    return "libtorch" in Path(f"/proc/{number}/maps").read_text()


def test_a_second_start_answers_like_the_first_and_loads_no_torch(home, kept):
    folder, root, wanted = kept
    with serving(folder, root) as (url, process, said):
        assert KEPT in said()
        assert answered(url) == wanted
        (engine,) = engines(process)
        assert not loads_torch(engine)
        os.kill(engine, signal.SIGKILL)
        until(lambda: said().count(KEPT) == 2, seconds=60)  # so does the engine that is started after a failure
        assert answered(url) == wanted
    home.answers = wanted


def test_weights_that_are_not_those_that_were_written_end_the_engine_and_the_next_one_starts_anew(home, kept):
    folder, root, wanted = kept
    (path,) = programs(root)
    found = layout.read(path)
    layout.write(path, msgspec.structs.replace(found, crc=found.crc ^ 1))  # as if a weight had changed that the first tokens do not show
    with serving(folder, root) as (url, process, said):
        until(lambda: "loaded in" in said(), seconds=60)
        assert "kept weights are not those that were written" in said()
        assert answered(url) == wanted
        until(lambda: programs(root), seconds=60)
        assert loads_torch(*engines(process))
    home.answers = wanted


def test_a_checkpoint_that_was_changed_is_started_anew(home, kept):
    folder, root, before = kept
    (old,) = programs(root)
    write_checkpoint(folder, folder, seed=1)
    with serving(folder, root) as (url, _, said):
        assert KEPT not in said()
        after = answered(url)
        assert after != before
        until(lambda: programs(root) not in ([], [old]), seconds=60)
    home.answers = after


def test_another_number_of_threads_is_another_start_with_that_number(kept):
    folder, root, _ = kept
    assert kept_threads(root) == [1]
    with serving(folder, root, OMP_NUM_THREADS="2") as (_, _, said):
        assert KEPT not in said()
        assert "; threads: 2" in said()
        until(lambda: kept_threads(root) == [2], seconds=60)
    with serving(folder, root, OMP_NUM_THREADS="2") as (_, _, said):
        assert KEPT in said()
        assert "; threads: 2" in said()


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
