"""Files of requests: the same answers as over HTTP, in order, and a run that was killed goes on."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_batch import MODEL, answered
from fake_engine import TEXT, FakeEngine, embedding, tokenizer
from in_thread import in_thread
from typer.testing import CliRunner
from world import serving

from lineshaft.base.errors import BadCheckpoint, ConfigError, LineshaftError, SourceError
from lineshaft.cli.main import app
from lineshaft.serve.batch import BatchConfig, answer_file, summary
from lineshaft.serve.limits import Limits
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.worker import Worker

SCRIPT = Path(__file__).with_name("fake_batch.py")


def request(name, url="/v1/completions", **body):
    body = {"model": MODEL, **({"prompt": "hello", "max_tokens": 64} if url == "/v1/completions" else {}), **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def written(path, requests):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in requests))
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_ids(path):
    """The bytes of an output without what differs from run to run."""
    return re.sub(r'"(id|request_id)":"[^"]*"|"created":\d+', "", path.read_text())


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "in.jsonl", [request(f"r{number}", seed=number, n=1 + number % 3) for number in range(12)])


# -- answers --------------------------------------------------------------------------------------------------------


def test_each_endpoint_answers_as_over_http_and_in_the_order_of_the_input(tmp_path):
    messages = [{"role": "user", "content": "价格?"}]
    requests = [
        request("long"),
        request("chat", "/v1/chat/completions", messages=messages, max_tokens=3),
        request("vectors", "/v1/embeddings", input=["a", "b"]),
        request("echo", max_tokens=0, echo=True, logprobs=1),
    ]
    tally = answered(written(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl", FakeEngine())
    told = answers(tmp_path / "out.jsonl")
    assert [item["custom_id"] for item in told] == ["long", "chat", "vectors", "echo"]
    assert all(item["error"] is None and item["response"]["status_code"] == 200 and item["id"] for item in told)
    bodies = [item["response"]["body"] for item in told]
    assert bodies[0]["choices"][0]["text"] == TEXT
    assert bodies[1]["choices"][0]["message"]["role"] == "assistant"
    assert bodies[2]["data"][0]["embedding"] == embedding([tokenizer().bos_id, *tokenizer().encode("a")])
    assert bodies[3]["choices"][0]["logprobs"]["token_logprobs"][0] is None
    with serving(FakeEngine()) as world:
        for item, body in zip(requests, bodies, strict=True):
            _, _, over_http = world.post(item["url"], item["body"])
            assert {**over_http, "id": 0, "created": 0} == {**body, "id": 0, "created": 0}
    assert summary(tally) == {"requests": 4, "answered_earlier": 0, "answered": 4, "refused": 0, "statuses": {"200": 4}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_the_server_would_refuse_is_refused_in_its_place(tmp_path):
    requests = [request("a", model="gpt-4"), request("b", n=0), request("c", stream=True), request("d"), request("e", prompt="x" * 2000)]
    source, target = written(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"

    def worker():
        return Worker(lambda: in_thread(FakeEngine), Metrics(MODEL), 64)

    tally = answer_file(worker, MODEL, source, target, BatchConfig(limits=Limits(max_body_bytes=1000)))
    told = [item["response"] for item in answers(target)]
    assert [item["status_code"] for item in told] == [404, 400, 400, 200, 413]
    assert told[1]["body"]["error"]["param"] == "n"
    assert tally.refused == 4


def test_more_than_the_queue_holds_are_all_answered(tmp_path):
    source = written(tmp_path / "in.jsonl", [request(f"r{number}", n=2) for number in range(24)])

    def worker():
        return Worker(lambda: in_thread(FakeEngine), Metrics(MODEL), 4)

    assert answer_file(worker, MODEL, source, tmp_path / "out.jsonl", BatchConfig()).refused == 0


def test_an_engine_that_fails_is_loaded_again_and_the_requests_are_tried_again(source, tmp_path, capfd):
    engines = iter([FakeEngine(break_at=5), FakeEngine()])

    def worker():
        return Worker(lambda: in_thread(lambda: next(engines)), Metrics(MODEL), 64)

    assert answer_file(worker, MODEL, source, tmp_path / "out.jsonl", BatchConfig()).refused == 0
    assert "a kernel failed" in capfd.readouterr().err


def test_an_engine_that_takes_its_time_to_start_again_is_waited_for(source, tmp_path):
    engines = iter([FakeEngine(break_at=5), FakeEngine()])

    def load():
        time.sleep(0.2)
        return next(engines)

    def worker():
        return Worker(lambda: in_thread(load), Metrics(MODEL), 64)

    assert answer_file(worker, MODEL, source, tmp_path / "out.jsonl", BatchConfig()).refused == 0


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_own_error(source, tmp_path):
    def load():
        raise BadCheckpoint("no weights here")

    with pytest.raises(BadCheckpoint):
        answer_file(lambda: Worker(load, Metrics(MODEL), 64), MODEL, source, tmp_path / "out.jsonl", BatchConfig())


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: Input data was truncated"),
        ("3", "line 2: Expected `object`"),
        (json.dumps({**request("b"), "url": "/v1/models"}), "line 2: Invalid enum value '/v1/models' - at `$.url`"),
        (json.dumps({**request("b"), "extra": 1}), "line 2: Object contains unknown field `extra`"),
        (json.dumps({**request("b"), "body": [1]}), "line 2: `body` must be a JSON object"),
        (json.dumps({"custom_id": "b"}), "line 2: Object missing required field `method`"),
        (json.dumps(request("a")), 'line 2: custom_id "a" stands in line 1 already'),
        ('{"custom_id": "\\ud800"}', "line 2: Input data was truncated"),
        ("[" * 3000, "line 2: "),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_begun(tmp_path, line, told):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request("a")) + "\n" + line + "\n\n" + json.dumps(request("z")))
    with pytest.raises(SourceError) as caught:
        answered(source, tmp_path / "out.jsonl", FakeEngine())
    assert f"{source}: {told}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_many_bad_lines_are_told_together_and_empty_and_missing_files_by_name(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("x\n" * 15)
    with pytest.raises(SourceError, match=r"line 1: JSON(.|\n)*line 10: JSON(.|\n)*and 5 more"):
        answered(source, tmp_path / "out.jsonl", FakeEngine())
    source.write_text("\n")
    with pytest.raises(SourceError, match="holds no request"):
        answered(source, tmp_path / "out.jsonl", FakeEngine())
    with pytest.raises(SourceError, match="No such file"):
        answered(tmp_path / "none", tmp_path / "out.jsonl", FakeEngine())


# -- going on -------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(source, tmp_path):
    answered(source, tmp_path / "whole.jsonl", FakeEngine())
    target, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with subprocess.Popen([sys.executable, str(SCRIPT), str(source), str(target), "0.02"], stderr=subprocess.DEVNULL) as child:
        while not part.exists() or part.read_bytes().count(b"\n") < 5:
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert not target.exists()
    kept = part.read_bytes().count(b"\n") - 1
    with part.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"r9","respon')
    engine = FakeEngine()
    tally = answered(source, target, engine)
    assert tally.earlier == kept >= 4
    assert without_ids(target) == without_ids(tmp_path / "whole.jsonl")
    assert not part.exists()


def test_an_answer_that_lost_only_the_end_of_its_line_is_given_again(source, tmp_path):
    target, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    header = json.dumps({"input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "model": MODEL}, separators=(",", ":"))
    part.write_text(header + '\n{"custom_id":"r0","kept":true}\n{"custom_id":"r1","kept":true}')
    assert answered(source, target, FakeEngine()).earlier == 1
    assert [item.get("kept", False) for item in answers(target)] == [True] + [False] * 11


def test_a_run_killed_at_every_step_loses_nothing_that_it_kept(tmp_path):
    source = written(tmp_path / "in.jsonl", [request(f"r{number}", max_tokens=2) for number in range(6)])
    (tmp_path / "runs").mkdir()
    answered(source, tmp_path / "whole.jsonl", FakeEngine())
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(source), str(tmp_path / "runs"), "every"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    twice = json.loads(done.stdout)
    assert len(twice) > 12
    assert set(twice) == {0}
    outputs = list((tmp_path / "runs").glob("*.jsonl"))
    assert len(outputs) > len(twice)
    assert {without_ids(path) for path in outputs} == {without_ids(tmp_path / "whole.jsonl")}
    assert not list((tmp_path / "runs").glob("*.part"))


def test_another_input_does_not_go_on_with_the_answers_of_the_first(source, tmp_path):
    target = tmp_path / "out.jsonl"
    target.with_name("out.jsonl.part").write_text('{"input_sha256":"0","model":"fake-1"}\n')
    with pytest.raises(ConfigError, match="was begun with another input"):
        answered(source, target, FakeEngine())


def test_answers_that_are_there_are_not_written_over(source, tmp_path):
    target = tmp_path / "out.jsonl"
    answered(source, target, FakeEngine())
    before = target.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        answered(source, target, FakeEngine())
    assert target.read_bytes() == before


def test_two_runs_do_not_write_the_same_file(source, tmp_path):
    engine = FakeEngine(gate=threading.Semaphore(0))
    first = threading.Thread(target=answered, args=(source, tmp_path / "out.jsonl", engine))
    first.start()
    engine.wait(lambda engine: engine.submitted)
    with pytest.raises(ConfigError, match="another run is writing it"):
        answered(source, tmp_path / "out.jsonl", FakeEngine())
    engine.gate.release(100_000)
    first.join(20)
    assert len(answers(tmp_path / "out.jsonl")) == 12


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_answers_with_a_real_model(tmp_path, tiny_model):
    chat = request("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0)
    source = written(tmp_path / "in.jsonl", [request("text", max_tokens=4, temperature=0), chat])
    command = [sys.executable, "-m", "lineshaft.cli.main", "batch", str(source), str(tmp_path / "out.jsonl"), "--model", str(tiny_model)]
    done = subprocess.run([*command, "--name", MODEL, "--json", "--set", "batch.in_flight=2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["statuses"] == {"200": 2}
    told = answers(tmp_path / "out.jsonl")
    assert [item["response"]["body"]["usage"]["completion_tokens"] for item in told] == [4, 4]
    again = CliRunner().invoke(app, command[3:]).exception
    assert isinstance(again, LineshaftError)
    assert again.exit_code == 2
    assert "exists already" in str(again)
