"""The server as a process: signals, ports, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import TEXT

from lineshaft.base.errors import ConfigError
from lineshaft.serve.server import ServeConfig, serve_until_stopped

SCRIPT = Path(__file__).with_name("fake_server.py")
ASK = {"model": "fake-1", "prompt": "hello", "max_tokens": 64, "stream": True}


@contextmanager
def process(*arguments):
    """A server process and its address."""
    child = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child, f"http://127.0.0.1:{int(child.stdout.readline())}"
    finally:
        child.kill()
        child.communicate()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def stream(url, **fields):
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps({**ASK, **fields}).encode(), {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=20)


def until_ready(url):
    while get(f"{url}/ready") != 200:
        time.sleep(0.01)


def text_of(lines):
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    assert not any("error" in event for event in events), events
    return "".join(event["choices"][0]["text"] for event in events)


def test_sigterm_lets_a_running_stream_end_refuses_new_ones_and_exits_with_0():
    with process(0.05, 20) as (child, url):
        until_ready(url)
        with stream(url) as answer:
            first = answer.readline()
            child.send_signal(signal.SIGTERM)
            while (status := get(f"{url}/ready")) == 200:
                continue
            assert status == 503
            assert get(f"{url}/health") == 200
            with pytest.raises(urllib.error.HTTPError, match="503"):
                stream(url)
            assert text_of([first, *answer]) == TEXT
        assert child.wait(10) == 0
        told = child.stderr.read()
    assert f"listening on {url}" in told and "ready in" in told
    assert "Traceback" not in told


def test_a_stream_that_outlasts_the_drain_after_sigint_ends_with_an_error_and_the_server_with_0():
    with process(0.05, 0.3) as (child, url):
        until_ready(url)
        with stream(url, ignore_eos=True, max_tokens=200) as answer:
            answer.readline()
            child.send_signal(signal.SIGINT)
            rest = answer.read()
        assert b'"error"' in rest and rest.endswith(b"data: [DONE]\n\n")
        assert child.wait(10) == 0
        assert "Traceback" not in child.stderr.read()


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_own_status():
    with process("broken") as (child, _):
        assert child.wait(20) == 5
        assert "no weights here" in child.stderr.read()


def test_a_port_in_use_is_said_in_words():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1 port {port}: .*in use"):
            serve_until_stopped(lambda: None, "x", ServeConfig(port=port), on_listening=print)


def test_a_host_that_is_not_ours_is_said_in_words():
    with pytest.raises(ConfigError, match="no-such-host"):
        serve_until_stopped(lambda: None, "x", ServeConfig(host="no-such-host.invalid"), on_listening=print)
