"""`lineshaft bench` against a fake server on loopback, by real time."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_line import begun, environment
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate" / "load"))  # pytest's importlib mode does not find helpers

from fake_openai import FakeOpenAI, served

from lineshaft.base.errors import ConfigError, LineshaftError
from lineshaft.cli import benching
from lineshaft.cli.main import app

QUICK = ("--rate", "20", "--duration", "1", "--set", "workload.prompt_tokens=4", "--set", "workload.output_tokens=3")


def call(*args: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *map(str, args)], prog_name="lineshaft", env=environment() | {"COLUMNS": "160"})
    if isinstance(done.exception, LineshaftError):
        return done.exception.exit_code, str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(FakeOpenAI(lambda _: 0.1, 0.02)) as found:
        yield found


def test_the_table_shows_every_figure(url: str) -> None:
    code, told = call(url, *QUICK, "--slo-e2e", "30")
    assert code in (0, 8)  # a machine that is busy enough makes this client late, and it says so
    for part in (r"P50", "P99", "first token (ttft)", "between tokens", "whole request", "goodput", "100.0 %", "client", "answered"):
        assert part in told


def test_json_and_files_hold_the_same_and_all_of_it(url: str, tmp_path: Path) -> None:
    code, told = call(url, *QUICK, "--seed", "3", "--json", "--out", tmp_path / "new" / "folder")
    shown: dict[str, Any] = json.loads(told)
    folder = tmp_path / "new" / "folder"
    assert code == (0 if shown["conclusive"] else 8)
    assert json.loads((folder / "bench.json").read_text()) == shown
    assert shown["target"] == {"url": url, "model": "fake", "api": "completions"}
    assert (shown["format"], shown["config"]["seed"], shown["config"]["workload"]["prompt_tokens"]["tokens"]) == (1, 3, 4)
    assert shown["machine"]["lineshaft"]
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == shown["requests"]["offered"] == shown["requests"]["answered"] > 5
    assert all(len(line["tokens_at"]) == 3 and line["sent"] >= line["scheduled"] - 0.002 for line in lines)
    assert ElementTree.parse(folder / "bench.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert call(url, *QUICK, "--out", folder) == (2, f"{folder} already holds bench.json: name another folder with --out")


def test_a_search_tells_the_rate_and_draws_its_probes(url: str, tmp_path: Path) -> None:
    settings = ["--arrivals", "constant", "--rate", "10", "--duration", "1", "--set", "search.highest=20", "--set", "search.probes=4"]
    settings += ["--set", "workload.output_tokens=1", "--slo-e2e", "30", "--slo-share", "0.5"]
    code, told = call(url, *settings, "--find-rate", "--json", "--out", tmp_path)
    shown = json.loads(told)
    assert shown["search"]["limit"] in ("highest", "client")  # the latter on a busy machine
    assert code == 0 if shown["conclusive"] else code == 8
    if code == 0:
        assert shown["metrics"]["max_rate_requests_per_second"] == shown["rate"] == shown["search"]["rate"]
    assert "probes" in (tmp_path / "bench.svg").read_text()


def test_a_trace_is_replayed(url: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 5, "max_tokens": 2}\n{"at": 5.2, "max_tokens": 2}\n')
    shown = json.loads(call(url, "--trace", path, "--json")[1])
    assert (shown["requests"]["answered"], shown["requests"]["output_tokens"], shown["rate"]) == (2, 4, None)


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--rate", "0"], 2, '"arrivals.rate": Input should be greater than 0'),
        (["--arrivals", "waves"], 2, '"arrivals"'),
        (["--duration", "-1"], 2, '"seconds"'),
        (["--set", "workload.prompt_token=3"], 2, 'did you mean "prompt_tokens"'),
        (["--set", "arrival.rate=3"], 2, 'did you mean "arrivals"'),
        (["--find-rate"], 2, "a search needs an SLO"),
        (["--find-rate", "--slo-e2e", "1", "--arrivals", "ramp"], 2, "constant or poisson"),
        (["--trace", "none.jsonl"], 2, "none.jsonl: can't be read"),
        (["--rate", "100", "--duration", "1000"], 2, "exceed max_requests"),
        (["--model", "other"], 7, 'does not serve "other"; it has fake'),
        (["--text", "none.txt"], 2, "none.txt: can't be read"),
        (["--set", "search.lowest=0", "--find-rate", "--slo-e2e", "1"], 2, '"search.lowest"'),
    ],
)
def test_what_is_wrong_is_told_before_any_load(url: str, args: list[str], code: int, told: str) -> None:
    assert (found := call(url, *args))[0] == code
    assert told in found[1]


def test_a_server_that_is_not_there_is_told() -> None:
    code, told = call("http://127.0.0.1:9")
    assert code == 2
    assert "http://127.0.0.1:9: no server answers there" in told


def test_figures_are_shown_although_the_files_cannot_be_written(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ConfigError("disk full")

    monkeypatch.setattr(benching, "_write", full)
    done = CliRunner().invoke(app, ["bench", url, *QUICK, "--json", "--out", str(tmp_path)], prog_name="lineshaft", env=environment())
    assert isinstance(done.exception, ConfigError)
    assert json.loads(done.stdout)["requests"]["answered"] > 0


def test_ctrl_c_before_the_first_answer_says_that_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benching, "bench", interrupted)
    done = CliRunner().invoke(app, ["bench"], prog_name="lineshaft", env=environment())
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "lineshaft: stopped before there was anything to show\n"


def test_nothing_answered_is_no_result() -> None:
    with served(FakeOpenAI(lambda _: 0.01, errors_from=0, status=503)) as url:
        code, told = call(url, *QUICK)
    assert code == 8
    assert "http 503: cannot" in told


def test_ctrl_c_shows_what_was_measured_until_then() -> None:
    fake = FakeOpenAI(lambda _: 0.05)
    with served(fake) as url:
        run = begun("bench", url, "--rate", "20", "--duration", "300", "--json")
        assert all(fake.answered.acquire(timeout=60) for _ in range(5))
        os.kill(run.pid, signal.SIGINT)
        status, told, said = run.ended(60)
    assert status == 130
    shown = json.loads(told)
    assert shown["interrupted"]
    assert shown["requests"]["answered"] >= 3
    assert said.splitlines()[-1] == "lineshaft: stopped; the figures are those of what was measured until then"
    assert "Traceback" not in said
