"""The engine in a process of its own: whatever happens to it, or to the server, nobody is left waiting and nothing is left behind."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from fake_engine import TEXT
from world import until

from lineshaft.serve import child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for child processes in /proc")

SCRIPT = Path(__file__).with_name("remote_server.py")
ASK = {"model": "fake-1", "prompt": "hello", "max_tokens": 64}
ENDLESS = {**ASK, "max_tokens": 200, "ignore_eos": True, "stream": True}
SLOW = {"step_seconds": 0.02, "slots": 64}


@dataclass
class Server:
    process: subprocess.Popen
    url: str

    @property
    def engines(self):
        """The processes that it has started and that are not reaped."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [int(number) for task in tasks.iterdir() for number in (task / "children").read_text().split()]

    def engine(self):
        until(lambda: self.status("/ready") == 200)
        (number,) = self.engines
        return number

    def status(self, path):
        return asyncio.run(self._get(path))[0]

    def metric(self, name):
        text = asyncio.run(self._get("/metrics"))[1]
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def ask(self, **fields):
        return asyncio.run(self._ask(fields))

    async def _get(self, path):
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return answer.status, await answer.text()

    async def _ask(self, fields):
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/v1/completions", json={**ASK, **fields}) as answer:
            return answer.status, await answer.json()


@contextmanager
def served(stall_seconds=60.0, **options):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(options), str(stall_seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield Server(process, f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.communicate()


def gone(number):
    """Ended; an orphan that nobody has reaped yet counts as such."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def streams(server, count, when_all_run):
    """Run so many endless streams; once each has text, do `when_all_run`. Returns what each got, and the seconds until all had ended."""
    running = asyncio.Semaphore(0)

    async def one(session):
        async with session.post(f"{server.url}/v1/completions", json=ENDLESS) as answer:
            assert answer.status == 200
            text = await answer.content.readline()
            running.release()
            return text + await answer.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(one(session)) for _ in range(count)]
        for _ in range(count):
            await running.acquire()
        when_all_run()
        began = time.monotonic()
        return await asyncio.gather(*tasks), time.monotonic() - began


def cut_off(server):
    with pytest.raises(aiohttp.ClientError):
        server.ask()


def assert_ended_with_an_error(texts):
    for text in texts:
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"code":"engine_error"' in text and b"may be sent again" in text


def test_killing_the_engine_under_fifty_streams_ends_them_within_two_seconds_and_the_next_request_is_answered():
    with served(**SLOW) as server:
        engine = server.engine()
        texts, seconds = asyncio.run(streams(server, 50, lambda: os.kill(engine, signal.SIGKILL)))
        assert_ended_with_an_error(texts)
        assert seconds < 2
        status, answer = server.ask()  # comes while the engine is started again, and waits for it
        assert (status, answer["choices"][0]["text"]) == (200, TEXT)
        assert server.engine() != engine
        assert server.metric("lineshaft:engine_restarts_total") == 1
        assert server.metric('vllm:request_success_total{finished_reason="error"') == 50
        assert server.metric('lineshaft:resident_memory_bytes{process="engine"}') > 1e6
        assert server.metric("vllm:prompt_tokens_total") == 51 * answer["usage"]["prompt_tokens"]  # counters go on


def test_an_engine_that_hangs_is_killed_and_its_clients_are_told():
    with served(stall_seconds=1.0, **SLOW) as server:
        engine = server.engine()
        texts, seconds = asyncio.run(streams(server, 5, lambda: os.kill(engine, signal.SIGSTOP)))
        assert_ended_with_an_error(texts)
        assert b"said nothing for 1 s" in texts[0]
        assert seconds < 3
        assert gone(engine)
        assert server.ask()[0] == 200


def test_an_engine_that_dies_with_nothing_to_do_is_replaced_before_anybody_meets_it():
    with served() as server:
        engine = server.engine()
        os.kill(engine, signal.SIGKILL)
        until(lambda: server.metric("lineshaft:engine_restarts_total") == 1)
        assert server.engine() != engine
        assert server.ask()[0] == 200


def test_readiness_is_red_while_the_engine_is_started_again():
    with served() as server:
        engine = server.engine()
        seen = []
        os.kill(engine, signal.SIGKILL)
        until(lambda: seen.append(server.status("/ready")) or (503 in seen and seen[-1] == 200))
        assert set(seen) <= {200, 503}


def test_a_step_that_raises_ends_its_clients_and_its_traceback_is_in_the_log():
    with served(break_at=3, slots=64, step_seconds=0.2) as server:
        server.engine()
        status, answer = server.ask()
        assert (status, answer["error"]["code"]) == (500, "engine_error")
        server.engine()
        assert server.ask(max_tokens=2)[0] == 200
        server.process.terminate()
        told = server.process.communicate(timeout=20)[1]
    assert "RuntimeError" in told and "fake_engine.py" in told
    assert "the engine failed" in told


def test_engines_that_fail_one_after_the_other_without_a_step_end_the_server():
    with served(break_at=1) as server:
        for _ in range(3):
            server.engine()
            assert server.ask()[0] == 500
        assert server.process.wait(20) == 9
        assert "3 engines in a row failed before they had done a step" in server.process.stderr.read()


@pytest.mark.parametrize(("loading", "status", "words"), [("broken", 5, "no weights here"), ("killed", 9, "signal 9")])
def test_an_engine_that_cannot_load_ends_the_server_with_the_status_of_the_error(loading, status, words):
    with served(loading=loading) as server:
        assert server.process.wait(20) == status
        assert words in server.process.stderr.read()


def test_a_server_that_is_killed_takes_its_engine_along():
    with served(step_seconds=30.0) as server:  # in a long step, when it does not look at its socket
        engine = server.engine()
        asking = threading.Thread(target=cut_off, args=(server,))
        asking.start()
        until(lambda: server.metric("vllm:num_requests_waiting") == 1)
        server.process.kill()
        until(lambda: gone(engine))
        asking.join(20)


def test_sigterm_to_the_whole_group_lets_streams_end_and_leaves_no_process_behind():
    with served(**SLOW) as server:
        engine = server.engine()

        def stop():
            for number in (server.process.pid, engine):
                os.kill(number, signal.SIGTERM)

        texts, _ = asyncio.run(streams(server, 3, stop))
        assert all(b'"finish_reason":"length"' in text and b'"error"' not in text for text in texts)
        assert server.process.wait(20) == 0
        assert gone(engine)


def test_a_second_signal_ends_everything_at_once_even_in_a_long_step():
    with served(step_seconds=30.0) as server:
        engine, answers = server.engine(), []
        asking = threading.Thread(target=lambda: answers.append(server.ask()))
        asking.start()
        until(lambda: server.metric("vllm:num_requests_waiting") == 1)
        server.process.terminate()
        until(lambda: server.status("/ready") == 503)
        assert server.metric("vllm:num_requests_waiting") == 1
        server.process.terminate()
        began = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 4
        assert gone(engine)
        asking.join(20)
        assert answers[0][0] == 503


def test_sigterm_while_the_model_loads_ends_at_once_and_the_engine_too():
    with served(loading="endless") as server:
        until(lambda: server.engines)
        (engine,) = server.engines
        server.process.terminate()
        began = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 3
        until(lambda: gone(engine))


def test_pages_are_free_within_100_ms_of_a_hang_up():
    async def hang_up(server):
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{server.url}/v1/completions", json=ENDLESS) as answer:
                await answer.content.readline()
                assert await used(session, server) > 0
                answer.close()
                began = time.monotonic()
            while await used(session, server) > 0:
                continue
            return time.monotonic() - began

    async def used(session, server):
        async with session.get(f"{server.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return max(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:kv_cache_usage_perc{"))

    with served(**SLOW) as server:
        server.engine()
        assert statistics.median(asyncio.run(hang_up(server)) for _ in range(5)) < 0.1
        assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
        assert server.metric('vllm:request_success_total{finished_reason="abort"') == 5


def test_the_engines_process_sets_how_much_torch_keeps_unless_the_user_has(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "to be restored")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setattr("sys.argv", ["child"])
    found = {}
    monkeypatch.setattr("importlib.import_module", lambda name: found.update(os.environ, imported=name))
    child.import_engine()
    assert found["imported"] == "lineshaft.serve.loading"
    assert (found["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], found["LRU_CACHE_CAPACITY"]) == ("64", "7")
