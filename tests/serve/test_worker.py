"""What happens when clients hang up, the engine fails, or the model can't be loaded."""

import asyncio
import json
import threading

import aiohttp
import openai
import pytest
from fake_engine import TEXT, FakeEngine
from world import MODEL, serving, until

from lineshaft.base.errors import BadCheckpoint

ASK = {"model": MODEL, "prompt": "hello", "max_tokens": 64}


def gated(**options):
    return FakeEngine(gate=threading.Semaphore(0), **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_client_that_hangs_up_frees_its_place(stream, steps):
    async def hang_up(world):
        async with aiohttp.ClientSession() as session:
            request = asyncio.create_task(post(session, world))
            await asyncio.to_thread(world.engine.wait, lambda engine: len(engine.submitted) == 1)
            for _ in range(steps):
                world.engine.gate.release()
            await asyncio.to_thread(world.engine.wait, lambda engine: engine.steps == steps)
            request.cancel()
            await asyncio.wait([request])
        await asyncio.to_thread(cancelled, world)

    async def post(session, world):
        async with session.post(f"{world.url}/v1/completions", json={**ASK, "stream": stream}) as answer:
            await answer.read()

    def cancelled(world):
        until(lambda: not world.worker.in_flight)
        world.engine.gate.release()  # the engine is inside a step; cancelling waits for its end
        world.engine.wait(lambda engine: engine.cancelled == [0])

    with serving(gated()) as world:
        asyncio.run(hang_up(world))
        world.engine.gate.release(1000)
        assert world.client().completions.create(**ASK).choices[0].text == TEXT


def test_a_failing_engine_ends_every_client_and_the_next_request_is_answered_by_a_fresh_one(capfd):
    with serving(gated(slots=2, break_at=3), FakeEngine()) as world:
        answers = {}

        def ask(name, stream):
            answers[name] = world.post("/v1/completions", {**ASK, "prompt": "secret question", "stream": stream})

        threads = []
        for number, (name, stream) in enumerate([("whole", False), ("stream", True), ("not started", True)], 1):
            threads.append(threading.Thread(target=ask, args=(name, stream)))
            threads[-1].start()
            until(lambda number=number: world.worker.in_flight == number)
            if number > 1:
                world.engine.gate.release()  # ends the step, so that the next one takes this request in
            world.engine.wait(lambda engine, number=number: len(engine.submitted) == number)
        world.engine.gate.release(1000)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        until(lambda: world.call("GET", "/ready")[0] == 200)
        assert world.client().completions.create(**ASK).choices[0].text == TEXT
        assert len(world.engines) == 2

    assert answers["whole"][0] == answers["not started"][0] == 500
    assert answers["whole"][2]["error"]["code"] == "engine_error"
    status, _, text = answers["stream"]
    *chunks, error, done, _ = text.split("\n\n")
    assert status == 200 and chunks and done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    told = capfd.readouterr().err
    assert "RuntimeError" in told and "fake_engine.py" in told
    assert "secret question" not in told


def test_the_official_client_sees_a_failure_in_the_middle_of_a_stream_as_an_error():
    with serving(gated(break_at=3), FakeEngine()) as world:
        world.engine.gate.release(1000)
        with pytest.raises(openai.APIError, match="may be sent again"):
            list(world.client().completions.create(**ASK, stream=True))


def test_while_the_model_loads_the_server_lives_but_is_not_ready():
    loaded = threading.Event()

    def load():
        loaded.wait()
        raise BadCheckpoint("no weights here")

    with serving(load=load) as world:
        status, headers, answer = world.call("GET", "/ready")
        assert (status, answer["error"]["code"]) == (503, "not_ready")
        assert "loaded" in answer["error"]["message"] and headers["retry-after"]
        assert world.call("GET", "/health")[0] == 200
        assert world.post("/v1/completions", ASK)[0] == 503
        assert world.client().models.list().data[0].id == MODEL
        loaded.set()
        until(lambda: world.worker.state == "failed")
        assert "could not be loaded" in world.call("GET", "/ready")[2]["error"]["message"]
        assert isinstance(world.worker.failure, BadCheckpoint)


def test_a_server_that_cannot_load_again_answers_everybody_and_says_so():
    with serving(gated(break_at=1)) as world:
        world.engine.gate.release(1000)
        assert world.post("/v1/completions", ASK)[0] == 500
        until(lambda: world.worker.state == "failed")
        assert world.post("/v1/completions", ASK)[0] == 503


def slow_to_come_back(*engines):
    """A `load` whose second engine waits for the event returned with it."""
    left, gate = list(engines), threading.Event()

    def load():
        if len(left) < len(engines):
            gate.wait()
        return left.pop(0)

    return load, gate


def test_a_request_given_back_while_it_waits_for_an_engine_is_never_run():
    engine = FakeEngine()
    load, gate = slow_to_come_back(FakeEngine(break_at=1), engine)

    async def hang_up(world):
        async with aiohttp.ClientSession() as session:
            first = asyncio.create_task(session.post(f"{world.url}/v1/completions", json={**ASK, "n": 3}))
            while world.worker.in_flight != 3:
                await asyncio.sleep(0.005)
            first.cancel()
            await asyncio.wait([first])
            while world.worker.in_flight:
                await asyncio.sleep(0.005)

    with serving(load=load) as world:
        until(lambda: world.worker.state == "ready")
        assert world.post("/v1/completions", ASK)[0] == 500
        assert world.worker.state == "restarting"
        asyncio.run(hang_up(world))
        gate.set()
        assert world.client().completions.create(**ASK).choices[0].text == TEXT
        assert len(engine.submitted) == 1


def test_requests_that_wait_for_an_engine_are_bounded_and_still_answered_when_the_server_drains():
    load, gate = slow_to_come_back(FakeEngine(break_at=1), FakeEngine())

    async def ask(world):
        async with aiohttp.ClientSession() as session:
            waiting = [asyncio.create_task(session.post(f"{world.url}/v1/completions", json=ASK)) for _ in range(2)]
            while world.worker.in_flight != 2:
                await asyncio.sleep(0.005)
            refused = await session.post(f"{world.url}/v1/completions", json=ASK)
            world.worker.drain()
            late = await session.post(f"{world.url}/v1/completions", json=ASK)
            gate.set()
            answers = await asyncio.gather(*waiting)
            return refused.status, late.status, [answer.status for answer in answers]

    with serving(load=load, max_waiting=2) as world:
        until(lambda: world.worker.state == "ready")
        assert world.post("/v1/completions", ASK)[0] == 500
        assert asyncio.run(ask(world)) == (429, 503, [200, 200])


def test_an_idle_worker_takes_no_steps():
    with serving(FakeEngine()) as world:
        world.post("/v1/completions", ASK)
        before = world.engine.steps
        for _ in range(20):
            world.call("GET", "/health")
        assert world.engine.steps == before


def test_requests_beyond_the_engines_slots_wait_and_are_all_answered():
    with serving(FakeEngine(slots=2), max_waiting=64) as world:

        async def many():
            async with aiohttp.ClientSession() as session:
                answers = await asyncio.gather(*(session.post(f"{world.url}/v1/completions", json=ASK) for _ in range(30)))
                return [(await answer.json())["choices"][0]["text"] for answer in answers]

        assert asyncio.run(many()) == [TEXT] * 30
        metrics = world.call("GET", "/metrics")[2]
        assert f'vllm:request_queue_time_seconds_count{{model_name="{MODEL}"}} 30.0' in metrics
        assert f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 0.0' in metrics
