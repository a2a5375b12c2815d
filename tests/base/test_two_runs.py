"""Several processes on one store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lineshaft.base.lock import locked
from lineshaft.base.store import Store

MAKERS = """
import json, os, sys
from pathlib import Path
from lineshaft.base.store import Artifact, Store

store, order, log = Store(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in order:
    with store.draft("corpus", stage="count", version=1, config={"number": number}) as draft:
        if not isinstance(draft, Artifact):
            with log.open("a") as file:
                file.write(f"{number}\\n")
            (draft.root / "a").write_bytes(bytes([number]) * 3_000_000)
    store.set_ref(f"last-{number}", [item.id for item in store.all()][0])
print(json.dumps([[item.config["number"], store.open(item.id).manifest.digest] for item in store.all()]))
"""

HOLDER = """
import sys
from lineshaft.base.store import Artifact, Store

with Store(sys.argv[1]).draft("corpus", stage="slow", version=1, config={}) as draft:
    print("built" if not isinstance(draft, Artifact) else "found", flush=True)
    if not isinstance(draft, Artifact):
        sys.stdin.readline()
        (draft.root / "a").write_bytes(b"1")
"""

FORKING = """
import os, sys
from lineshaft.base.store import Store

with Store(sys.argv[1]).draft("corpus", stage="slow", version=1, config={}) as draft:
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        while True:
            os.read(0, 1)  # a pool worker that outlives its parent
    while True:
        os.read(0, 1)
"""


def start(script: str, *args: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("orders", [[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [2, 1, 0], [1, 0, 2], [3, 0]]])
def test_runs_at_once_build_each_artifact_once_and_agree(tmp_path: Path, orders: list[list[int]]) -> None:
    runs = [start(MAKERS, tmp_path / "store", json.dumps(order), tmp_path / "log") for order in orders]
    for run in runs:
        assert run.stdout and run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin
        run.stdin.write("go\n")
        run.stdin.flush()
    told = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), told
    wanted = sorted({number for order in orders for number in order})
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == wanted
    store = Store(tmp_path / "store")
    final = {item.config["number"]: store.open(item.id).manifest.digest for item in store.all()}
    assert sorted(final) == wanted
    for out, _ in told:
        assert all(final[number] == digest for number, digest in json.loads(out))


def test_the_second_run_says_that_it_waits_and_then_finds_the_work_done(tmp_path: Path) -> None:
    first = start(HOLDER, tmp_path)
    assert first.stdout and first.stdout.readline() == "built\n"
    second = start(HOLDER, tmp_path)
    assert second.stderr and "waiting" in second.stderr.readline()
    first.communicate("go\n", timeout=30)
    assert second.communicate(timeout=30)[0] == "found\n"


def test_a_waiting_run_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    first = start(HOLDER, tmp_path)
    assert first.stdout and first.stdout.readline() == "built\n"
    second = start(HOLDER, tmp_path)
    assert second.stderr and "waiting" in second.stderr.readline()
    first.kill()
    first.communicate()
    assert second.communicate("go\n", timeout=30)[0] == "built\n"
    assert len(list(Store(tmp_path).all())) == 1


def test_a_forked_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    first = start(FORKING, tmp_path)
    assert first.stdout
    orphan = int(first.stdout.readline())
    try:
        first.kill()
        first.wait()
        second = start(HOLDER, tmp_path)
        assert second.communicate("go\n", timeout=30) == ("built\n", "")
    finally:
        os.kill(orphan, signal.SIGKILL)
        first.stdout.close()


def test_locks_of_different_artifacts_do_not_wait_for_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        assert capsys.readouterr().err == ""
